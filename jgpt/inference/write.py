"""Texts that a model writes after prompts, piece by piece.

After training, in the data path: around `decode.py`; the API and its commands are the callers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jgpt.data.tokenizer import Tokenizer
from jgpt.inference.decode import stream
from jgpt.inference.rounds import STREAM_STEPS
from jgpt.inference.sampling import Sampling
from jgpt.inference.stop_strings import StopStrings
from jgpt.inference.text_stream import TextStream
from jgpt.model.gpt import GPT


class Prompt(NamedTuple):
    """What a model is shown, and which of it is text: not the ids with which a tokenizer begins every text."""

    ids: list[int]
    text: list[int]


class Piece(NamedTuple):
    """The next piece of a text: the number of the text, the piece (it may be ""), and the tokens that were drawn."""

    number: int
    text: str
    n_tokens: int


def write(
    model: GPT,
    variables: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    stop: Sequence[str] = (),
    context_length: int = 0,
    steps: int = STREAM_STEPS,
) -> Iterator[Piece]:
    """Continue prompts; return an iterator over pieces of text while they are made, which break no character.

    A text ends before any of the strings of `stop`, and at any of `stop_ids`.
    `context_length` is the most tokens in view at a time, 0 for the model's own; `steps` the most tokens of a piece.
    Raises UserError at once for what is out of range, and NonFiniteLogits while the text is made.
    """
    ids = stream(
        model,
        variables,
        [prompt.ids for prompt in prompts],
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        n_ids=tokenizer.vocab_size,
        seed=seed,
        context_length=context_length,
        steps=min(steps, STREAM_STEPS) if stop else steps,  # else much would be made that nobody reads
    )
    return _pieces(ids, [(TextStream(tokenizer, prompt.text), StopStrings(stop)) for prompt in prompts])


def _pieces(ids: Iterator[tuple[int, list[int]]], texts: list[tuple[TextStream, StopStrings]]) -> Iterator[Piece]:
    going = set(range(len(texts)))
    for b, new in ids:
        if b in going:
            text, stops = texts[b]
            shown, ends = stops.add(text.add(new))
            yield Piece(b, shown, len(new))
            going -= {b} if ends else set()
            if not going:
                return
    for b in sorted(going):
        text, stops = texts[b]
        shown, ends = stops.add(text.close())
        if rest := shown + ("" if ends else stops.close()):
            yield Piece(b, rest, 0)


def text_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """Return the prompt for continuing a text; without one the model begins a new document."""
    ids = tokenizer.encode(text).tolist()
    return Prompt((tokenizer.start_ids or ([] if ids else [tokenizer.eot_id])) + ids, ids)
