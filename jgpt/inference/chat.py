"""Hold a conversation: take a question, return the model's answer piece by piece.

In the data path: around `decode.py`; the model's own template (`data/chat_template.py`) makes a prompt of the messages.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jgpt.config.files import user_path
from jgpt.data.chat_template import Message, render
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.unknown import name_unknown, unknown_characters
from jgpt.errors import UserError
from jgpt.inference.decode import compilations, generate
from jgpt.inference.sampling import Sampling
from jgpt.inference.text_stream import TextStream
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
        tokenizer: Tokenizer,
        *,
        template: str,
        system: str | None,
        sampling: Sampling,
        max_new_tokens: int,
        context_length: int,
        stop_ids: Iterable[int],
        seed: int,
    ) -> None:
        """Prepare the conversation; `system` is its first message, None for the template's default.

        Raises UserError when a rule of `sampling` is out of range.
        """
        sampling.validate()
        self.model, self.variables, self.tokenizer, self.template = model, variables, tokenizer, template
        self.sampling, self.max_new_tokens, self.seed = sampling, max_new_tokens, seed
        self.context_length = min(context_length or model.config.context_length, model.config.context_length)
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        self.unknown: Counter[str] = Counter()  # characters not in the vocabulary that a message has named
        self.forgotten = 0  # the number of oldest messages that no longer fit the context
        self.stop_ids = [*stop_ids, *self._end_of_turn()]

    def ask(self, question: str, write: Callable[[str], None]) -> Answer:
        """Answer a question, and add both to the conversation; `write` gets the text while it is generated.

        Ctrl-C ends the answer, and its beginning is kept. Raises UserError when the question does not fit the context.
        """
        ids, answer = self._prompt({"role": "user", "content": question})
        most = min(self.max_new_tokens, self.context_length - len(ids))
        stream, compiled, began = TextStream(self.tokenizer, ids), compilations(), time.perf_counter()

        def on_tokens(_: int, new: list[int]) -> None:
            if not answer.n_tokens:
                answer.seconds_to_first = time.perf_counter() - began
            answer.n_tokens += len(new)
            emit(stream.add(new))

        def emit(piece: str) -> None:
            answer.text += piece
            write(piece)

        try:
            generate(
                self.model,
                self.variables,
                [ids],
                sampling=self.sampling,
                max_new_tokens=most,
                stop_ids=self.stop_ids,
                n_ids=self.tokenizer.vocab_size,
                seed=self.seed,
                on_tokens=on_tokens,
            )
        except KeyboardInterrupt:
            answer.notes.append("stopped")
        answer.seconds = time.perf_counter() - began
        emit(stream.close())
        if answer.n_tokens == most:
            answer.notes.append(f"cut at {most}")
        if compilations() > compiled:
            answer.notes.append("compilation included")
        if answer.text.strip():
            content = answer.text.strip()
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        return answer

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.turns, self.forgotten = [], 0

    def save(self, path: Path) -> None:
        """Add the whole conversation to a file, as one line of JSON that fine-tuning reads."""
        if not self.turns:
            raise UserError("there is nothing to save yet. Needed: a question and its answer. Ask something first.")
        try:
            with user_path(str(path)).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.system + self.turns}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}. Allowed: a file in a directory that is there. Name one."
            ) from None

    def _prompt(self, question: Message) -> tuple[list[int], Answer]:
        """Encode the system prompt, the question, and as many of the last turns as leave room for an answer."""
        room = self.context_length - min(self.max_new_tokens, self.context_length // 2)
        for first in range(self.forgotten, len(self.turns) + 1, 2):
            text = self._render([*self.system, *self.turns[first:], question])
            ids = self.tokenizer.encode(text).tolist()
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

    def _render(self, messages: list[Message]) -> str:
        # A template writes all special tokens, the first one too, so the tokenizer adds none.
        return render(self.template, self.tokenizer.settings, messages, True)

    def _end_of_turn(self) -> list[int]:
        """Return the special token with which the template ends an answer; it often differs from the end of a text."""
        marker = "\N{SNOWMAN}"
        messages = [*self.system, {"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
        _, _, end = render(self.template, self.tokenizer.settings, messages, False).rpartition(marker)
        ids = self.tokenizer.encode(end).tolist()[:1]
        special = self.tokenizer.backend.get_added_tokens_decoder()
        return [i for i in ids if i in special and special[i].special]


def talk(chat: Chat, read: Callable[[], str], write: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Answer each message that `read` returns, until it raises EOFError or the message is /quit.

    `write` takes the text of answers, `say` all other messages. Only what HELP lists is a command.
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
                answer = chat.ask(message, write)
                write("\n")
                say(f"[{answer.summary()}]")
        except UserError as error:
            say(f"error: {error}")
