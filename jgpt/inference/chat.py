"""Hold a conversation: take a question, return the model's answer piece by piece.

In the data path: around `decode.py`; the model's own template (`data/chat_template.py`) makes a prompt of the messages.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jgpt.config.files import user_path
from jgpt.data.chat_template import Message
from jgpt.data.unknown import name_unknown, unknown_characters
from jgpt.errors import UserError
from jgpt.inference.chat_prompt import ChatPrompts
from jgpt.inference.rounds import compilations
from jgpt.inference.sampling import Sampling
from jgpt.inference.write import Piece, Prompt, write
from jgpt.model.gpt import GPT

HELP = """What you type is a message, unless it is one of these:
/reset      forget the conversation (the system prompt stays)
/save FILE  add the conversation to FILE as a line of JSON, as jgpt.train reads for fine-tuning (data.format=chat)
/quit       end, as Ctrl-D does; Ctrl-C stops an answer
/help       this
Three quotes (\"\"\") before and after a message let it have several lines."""


@dataclass
class Answer:
    """One answer of the model, its times, and notes for the user."""

    text: str = ""
    n_tokens: int = 0
    seconds_to_first: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Return one line: the tokens, the tokens a second after the first, the wait for the first, and the notes."""
        parts = [f"{self.n_tokens} tokens"]
        if self.n_tokens > 1:
            parts += [f"{(self.n_tokens - 1) / (self.seconds - self.seconds_to_first):.1f} a second"]
        return ", ".join([*parts, f"the first after {self.seconds_to_first:.2f} s", *self.notes])


class Chat:
    """A model, the rules for its answers, and the conversation so far."""

    def __init__(
        self,
        model: GPT,
        variables: Any,
        prompts: ChatPrompts,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        context_length: int,
        seed: int,
    ) -> None:
        """Prepare the conversation; raise UserError when a rule of `sampling` is out of range."""
        sampling.validate()
        self.model, self.variables, self.prompts, self.tokenizer = model, variables, prompts, prompts.tokenizer
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed
        self.context_length = min(context_length or model.config.context_length, model.config.context_length)
        self.turns: list[Message] = []
        self.unknown: Counter[str] = Counter()  # characters not in the vocabulary that a message has named
        self.forgotten = 0  # the number of oldest messages that no longer fit the context

    def ask(self, question: str, show: Callable[[str], None]) -> Answer:
        """Answer a question, and add both to the conversation; `show` gets the text while it is generated.

        Ctrl-C ends the answer, and its beginning is kept. Raises UserError when the question does not fit the context.
        """
        ids, answer = self._prompt({"role": "user", "content": question})
        most = min(self.max_new_tokens, self.context_length - len(ids))
        compiled, began = compilations(), time.perf_counter()
        try:
            for _, text, n_tokens in self._pieces(ids, most):
                if not answer.n_tokens:
                    answer.seconds_to_first = time.perf_counter() - began
                answer.n_tokens += n_tokens
                answer.text += text
                show(text)
        except KeyboardInterrupt:
            answer.notes.append("stopped")
        answer.seconds = time.perf_counter() - began
        if answer.n_tokens == most:
            answer.notes.append(f"cut at {most}")
        if compilations() > compiled:
            answer.notes.append("compilation included")
        if answer.text.strip():
            content = answer.text.strip()
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        return answer

    def warm_up(self) -> None:
        """Compile what an answer to a short question needs, by beginning one: the first answer need not wait for it."""
        ids = self.prompts.ids(self.prompts.text([{"role": "user", "content": "?"}]))
        if len(ids) < self.context_length:
            next(self._pieces(ids, self.context_length - len(ids)), None)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.turns, self.forgotten = [], 0

    def save(self, path: Path) -> None:
        """Add the whole conversation to a file, as one line of JSON that fine-tuning reads."""
        if not self.turns:
            raise UserError("there is nothing to save yet. Needed: a question and its answer. Ask something first.")
        try:
            with user_path(str(path)).open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":  # some editors leave the last line without its end
                        file.write(b"\n")
                line = json.dumps({"messages": self.prompts.system + self.turns}, ensure_ascii=False)
                file.write(line.encode("utf-8", "replace") + b"\n")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}. Allowed: a file in a directory that is there. Name one."
            ) from None

    def _pieces(self, ids: list[int], most: int) -> Iterator[Piece]:
        """Return an iterator over the pieces of an answer to a prompt, of `most` tokens at most."""
        return write(
            self.model,
            self.variables,
            self.tokenizer,
            [Prompt(ids, ids)],
            sampling=self.sampling,
            max_new_tokens=min(self.max_new_tokens, most),
            stop_ids=self.prompts.stop_ids,
            stop=self.prompts.stop,
            seed=self.seed,
        )

    def _prompt(self, question: Message) -> tuple[list[int], Answer]:
        """Encode the system prompt, the question, and as many of the last turns as leave room for an answer."""
        room = self.context_length - min(self.max_new_tokens, self.context_length // 2)
        for first in range(self.forgotten, len(self.turns) + 1, 2):
            text = self.prompts.text([*self.turns[first:], question])
            ids = self.prompts.ids(text)
            if len(ids) <= room:
                answer, self.forgotten = Answer(), first
                if first:
                    answer.notes.append(f"without the first {first // 2} turns, for which there is no room")
                unknown = unknown_characters(self.tokenizer, text)
                if new := Counter({c: n for c, n in unknown.items() if c not in self.unknown}):
                    answer.notes.append(name_unknown(new, "the conversation"))
                self.unknown |= unknown
                return ids, answer
        raise UserError(
            f"the question is too long: with the system prompt it has {len(ids)} tokens. Allowed: {room}, in a context"
            f" of {self.context_length}. Shorten it, or raise --context_length where the model has more."
        )


def talk(chat: Chat, read: Callable[[], str], show: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Answer each message that `read` returns, until it raises EOFError or the message is /quit.

    `show` takes the text of answers, `say` all other messages. Only what HELP lists is a command.
    """
    while True:
        try:
            message = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit ends the chat.")
            continue
        command, _, file = message.partition(" ")
        try:
            if message == "/quit":
                return
            elif message == "/reset":
                chat.reset()
                say("The conversation is empty again.")
            elif message == "/save":
                say("/save needs the name of a file: /save FILE")
            elif command == "/save" and "\n" not in file:
                chat.save(Path(file.strip()))
                say(f"Added to {file.strip()}.")
            elif message == "/help":
                say(HELP)
            elif message:
                answer = chat.ask(message, show)
                show("\n")
                say(f"[{answer.summary()}]")
        except UserError as error:
            say(f"error: {error}")
