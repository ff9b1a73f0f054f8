"""A loaded model, as users of the Python API have it: it continues texts, answers messages, and measures text.

After training, in the data path: around `inference/` and `measure.py`. `jgpt.load` makes one; the commands use it, too.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jgpt.data.chat_template import Message
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.unknown import name_unknown, unknown_characters
from jgpt.errors import UserError
from jgpt.inference.arguments import seed_of, stop_strings, string, whole
from jgpt.inference.chat_prompt import ChatPrompts, chat_sampling, conversation
from jgpt.inference.rounds import STREAM_STEPS, UNLIMITED
from jgpt.inference.sampling import Sampling
from jgpt.inference.write import Piece, Prompt, text_prompt, write
from jgpt.loading.load import LoadedModel
from jgpt.loading.measure import (
    Measured,
    block_length,
    measure_messages,
    measure_string,
    measure_validation_split,
    text_or_conversations,
)
from jgpt.loading.source import local_directory

log = logging.getLogger("jgpt")
SEED = 1337
TEXT_TOKENS, ANSWER_TOKENS = 200, 1024  # at most, where the caller does not say


class Model:
    """A model that continues texts, answers messages, and measures text. `jgpt.load` makes it.

    The arguments of its methods: `max_new_tokens` is the most tokens to write. `temperature` 0 takes always the
    likeliest token, 1 the model's own distribution; `top_k` draws from the k likeliest tokens only (0: all); `top_p`
    from the fewest likeliest that add up to this probability (1: all); `min_p` from those at least this share as likely
    as the likeliest (0: all); `repetition_penalty` above 1 makes tokens less likely that the text already holds. For a
    text, what is not given is 0.8, 50, 1, 0 and 1. For a chat it is what the model's publisher advises, else 0.7, 50,
    0.95, 0 and 1. A text ends before any of the strings of `stop`. The same `seed` gives the same text, None another
    one each time. Values that are out of range raise UserError.
    """

    def __init__(self, name: str, loaded: LoadedModel, chat_template: str) -> None:
        """Prepare a loaded model; `chat_template` is a Jinja template, or "" for a model that answers no messages."""
        self.name, self.loaded, self.chat_template = name, loaded, chat_template
        self._directory = local_directory(name)  # found again where the program goes to another folder
        self._prompts: ChatPrompts | None = None

    def __repr__(self) -> str:
        return f"jgpt.load({self.name!r})"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode` and `decode`."""
        return self.loaded.tokenizer

    @property
    def context_length(self) -> int:
        """The most tokens that the model sees at a time."""
        return self.loaded.model.config.context_length

    @property
    def step(self) -> int | None:
        """The training step of a run's checkpoint; None for a model of others."""
        return self.loaded.step

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int | None = SEED,
    ) -> str:
        """Continue a text; return what follows it, 200 tokens at most. Without a text the model begins a document."""
        rules = _given(temperature, top_k, top_p, min_p, repetition_penalty)
        how = _How(max_new_tokens, rules, stop, seed, UNLIMITED)
        return "".join(piece.text for piece in self._continue(prompt, how))

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int | None = SEED,
    ) -> str:
        """Answer a conversation, or one question; return the answer, 1024 tokens at most.

        Messages are {"role": "system", "user" or "assistant", "content": TEXT}. Raises UserError for a model without a
        chat template, and for a conversation that is too long.
        """
        rules = _given(temperature, top_k, top_p, min_p, repetition_penalty)
        how = _How(max_new_tokens, rules, stop, seed, UNLIMITED)
        return "".join(piece.text for piece in self._answer(messages, how))

    def stream(
        self,
        prompt: str | Sequence[Message] = "",
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int | None = SEED,
    ) -> Iterator[str]:
        """Return an iterator over what `generate` returns for a text, or `chat` for messages, in pieces."""
        rules = _given(temperature, top_k, top_p, min_p, repetition_penalty)
        how = _How(max_new_tokens, rules, stop, seed, STREAM_STEPS)
        pieces = self._continue(prompt, how) if isinstance(prompt, str) else self._answer(prompt, how)
        return (piece.text for piece in pieces if piece.text)

    def evaluate(self, text: str | Sequence[Any] | None = None, *, sequence_length: int = 0) -> Measured:
        """Measure the model on a text, or on the answers in conversations; without any on its run's validation split.

        A conversation is a list of messages. Several are a list of such lists, or of what lines of a file would hold in
        any layout that training reads. Of conversations only what training learns is counted: the answers.

        Returns `loss` (nats per token), `perplexity`, `bits_per_byte`, and how many tokens and bytes they are of. The
        text is measured in blocks of `sequence_length` tokens (0: as in training, or up to 2048). Raises UserError for
        a text that is too short, for what is no conversation, and for a model of others without a text.
        """
        length = block_length(self.loaded, whole("sequence_length", sequence_length, 0))
        if text is None:
            return measure_validation_split(self.loaded, str(self._directory or self.name), length)
        given = text_or_conversations(text)
        if isinstance(given, str):
            return measure_string(self.loaded, given, length)
        return measure_messages(self.loaded, given, self.require_template(), length)

    def require_template(self) -> str:
        """Return the chat template; raise UserError for a model without one."""
        if not self.chat_template:
            raise UserError(
                f"{self.name} has no chat template: nothing says how a conversation is put to it. Needed: a model that"
                " was trained to answer, or its template in a file (--chat_template=FILE,"
                " jgpt.load(..., chat_template=FILE)). A base model continues a text instead: python -m jgpt.generate,"
                " model.generate."
            )
        return self.chat_template

    def chat_prompts(self, system: Sequence[Message] = ()) -> ChatPrompts:
        """Return what makes prompts of messages; raise UserError for a model without a chat template."""
        return ChatPrompts(self.tokenizer, self.require_template(), self.loaded.stop_ids, system)

    def pieces(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seed: int,
        stop_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        context_length: int = 0,
        steps: int = STREAM_STEPS,
    ) -> Iterator[Piece]:
        """Return an iterator over pieces of several texts, with their tokens; see `jgpt.inference.write`."""
        return write(
            self.loaded.model,
            {"params": self.loaded.params},
            self.tokenizer,
            prompts,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop_ids=self.loaded.stop_ids if stop_ids is None else stop_ids,
            seed=seed,
            stop=stop,
            context_length=context_length,
            steps=steps,
        )

    def _continue(self, prompt: str, how: "_How") -> Iterator[Piece]:
        prompt = string("the prompt", prompt, "Several texts are several calls.")
        self._warn_of_unknown(prompt, "the prompt")
        return self.pieces(
            [text_prompt(self.tokenizer, prompt)],
            Sampling(**how.rules),
            max_new_tokens=how.most(TEXT_TOKENS),
            seed=seed_of(how.seed),
            stop=stop_strings(how.stop),
            steps=how.steps,
        )

    def _answer(self, messages: str | Sequence[Message], how: "_How") -> Iterator[Piece]:
        most, messages = how.most(ANSWER_TOKENS), conversation(messages)
        self._prompts = self._prompts or self.chat_prompts()
        shown = self._prompts.text(messages)
        self._warn_of_unknown(shown, "the conversation")
        ids = self._prompts.ids(shown)
        room = self.context_length - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation is too long: it has {len(ids):,} tokens. Allowed: {self.context_length - 1:,}, which"
                " leaves one for the answer. Shorten it, or leave out its first messages."
            )
        return self.pieces(
            [Prompt(ids, ids)],
            chat_sampling(self.loaded.sampling, how.rules),
            max_new_tokens=min(most, room),
            seed=seed_of(how.seed),
            stop_ids=self._prompts.stop_ids,
            stop=[*stop_strings(how.stop), *self._prompts.stop],
            steps=how.steps,
        )

    def _warn_of_unknown(self, text: str, what: str) -> None:
        if note := name_unknown(unknown_characters(self.tokenizer, text), what):
            log.warning("%s", note)


class _How(NamedTuple):
    """How a text is written: what was given to `generate`, `chat` or `stream`, and the most tokens of a piece."""

    max_new_tokens: int | None
    rules: dict[str, Any]  # of sampling, as far as they were given
    stop: str | Sequence[str] | None
    seed: int | None
    steps: int

    def most(self, default: int) -> int:
        """Return the most tokens to write; raise UserError where what was given is no such number."""
        return whole("max_new_tokens", default if self.max_new_tokens is None else self.max_new_tokens, 0)


def _given(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
) -> dict[str, Any]:
    """Return the rules that were given."""
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    return {name: value for name, value in given.items() if value is not None}
