"""The loss of a loaded model on text of the user's, or on the validation split of its run.

After training, in the data path: `jgpt.evaluate` prints it.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from jgpt.data.batches import Batch, chat_row, validation_blocks
from jgpt.data.blocks import TokenStream, blocks
from jgpt.data.conversations import ChatCorpus, GivenConversations, encoded, say_what_was_read
from jgpt.data.corpus import Corpus
from jgpt.data.find_files import find_files
from jgpt.data.packing import pack_rows
from jgpt.data.pieces import cut
from jgpt.data.token_directory import token_directory
from jgpt.data.token_files import TokenData, open_token_data
from jgpt.data.unknown import unknown_characters
from jgpt.data.words import LEARNED
from jgpt.errors import UserError
from jgpt.loading.load import LoadedModel
from jgpt.parallel.evaluation import bits_per_byte, evaluate

LONGEST_NAME = 4096  # characters of a path
LONGEST = 2048  # tokens of a block, where neither the user nor a run says how many


@dataclass(frozen=True)
class Measured:
    """What was measured: `loss` is the mean over `n_tokens` predicted tokens of `n_bytes` of text, in nats.

    Of conversations both count the answers alone.
    """

    loss: float
    n_tokens: int
    n_bytes: int
    bits_per_byte: float
    unknown: Counter[str] = field(default_factory=Counter)  # characters that the vocabulary lacks
    is_chat: bool = False  # of conversations

    @property
    def perplexity(self) -> float:
        """Return e to the loss; infinity where that is larger than a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def block_length(loaded: LoadedModel, given: int) -> int:
    """Return the tokens of a block: as given, as the run was trained, or what the model sees up to LONGEST.

    Raises UserError where the model sees less than was given.
    """
    most = loaded.model.config.context_length
    length = given or loaded.config.batch.sequence_length or min(most, LONGEST)
    if length > most:
        raise UserError(f"sequence_length={length}, and the model sees {most} tokens. Allowed: up to that. Give less.")
    return length


def measure_string(loaded: LoadedModel, text: str, length: int) -> Measured:
    """Measure a model on a document, in blocks of `length` tokens. Raises UserError where it is too short."""
    return _measure(loaded, TokenStream(cut([text]), loaded.tokenizer), length)


def measure_files(
    loaded: LoadedModel, text_glob: str, text_field: str, encoding: str, encoding_errors: str, length: int
) -> Measured:
    """Measure a model on text files, in blocks of `length` tokens. Raises UserError of the files."""
    corpus = Corpus(find_files(text_glob), text_field=text_field, encoding=encoding, encoding_errors=encoding_errors)
    return _measure(loaded, TokenStream(corpus.pieces(), loaded.tokenizer), length)


def measure_chat_files(
    loaded: LoadedModel, text_glob: str, template: str, encoding: str, encoding_errors: str, length: int
) -> Measured:
    """Measure a model on the answers in files of conversations, as `measure_chat`. Raises UserError of the files."""
    files = find_files(text_glob, "chat")
    corpus = ChatCorpus(
        files,
        encoding=encoding,
        encoding_errors=encoding_errors,
        template=template,
        settings=loaded.tokenizer.settings,
    )
    return measure_chat(loaded, corpus, length)


def text_or_conversations(given: Any) -> str | list[Any]:
    """Return what a program gave as the text that it is, or as a list of conversations; raise UserError.

    The name of a file is refused: measured as a text it would give a number that says nothing.
    """
    if isinstance(given, str) and not (len(given) < LONGEST_NAME and os.path.isfile(given)):
        return given
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, list | tuple) and any(isinstance(part, str) for part in given):
        raise UserError(
            f"given was the list {str(given)[:60]}, with texts in it. Allowed: one text, or conversations in a list."
            " Measure several texts one after the other, or joined."
        )
    if isinstance(given, str | bytes | bytearray | os.PathLike | io.IOBase) or not isinstance(given, Iterable):
        kind = "the name of a file" if isinstance(given, str) else type(given).__name__
        raise UserError(
            f"given was {str(given)[:60]!r}, {kind}. Allowed: the text itself, as Path(NAME).read_text() returns it,"
            " or conversations in a list. Files are measured by jgpt evaluate --text_glob=NAME."
        )
    return list(given)


def measure_messages(loaded: LoadedModel, given: Sequence[Any], template: str, length: int) -> Measured:
    """Measure a model on the answers in conversations, as `measure_chat`.

    `given` is one conversation, as its messages, or several: each a list of messages, or what a line of a file would
    hold. Raises UserError for what is no conversation.
    """
    is_one = bool(given) and all(isinstance(x, Mapping) and ("role" in x or "from" in x) for x in given)
    records = [_line(x) for x in ([given] if is_one else given)]
    corpus = GivenConversations([], template=template, settings=loaded.tokenizer.settings, given=records)
    return measure_chat(loaded, corpus, length)


def _line(given: Any) -> Any:
    """Return what a line of a file would hold for a conversation in memory."""
    if isinstance(given, list | tuple):
        return {"messages": list(given)}
    return dict(given) if isinstance(given, Mapping) else given


def measure_chat(loaded: LoadedModel, corpus: ChatCorpus, length: int) -> Measured:
    """Measure a model on what training would learn of conversations, in rows of `length` tokens, packed as there.

    Raises UserError for a line that is no conversation, and where no answer is left.
    """
    words: list[np.ndarray] = []
    n_bytes, unknown = 0, Counter[str]()
    for conversation, texts in encoded(corpus, loaded.tokenizer):
        words += texts
        n_bytes += conversation.n_bytes
        for parts in conversation.texts:
            unknown += unknown_characters(loaded.tokenizer, "".join(parts))
    say_what_was_read(corpus)
    if not words:
        raise UserError(
            f"there is no answer of the assistant to measure: {corpus.unanswered} conversations are without one. Give"
            " conversations with an answer."
        )
    rows = pack_rows(together := np.concatenate(words), length + 1, "measured", "sequence_length")
    loss, n_tokens = evaluate_loaded(loaded, (chat_row(rows, i) for i in range(len(rows))), _rows(length), length)
    n_learned = int(np.count_nonzero(together & LEARNED))
    return Measured(loss, n_tokens, n_bytes, bits_per_byte(loss, n_learned, n_bytes), unknown, is_chat=True)


def _measure(loaded: LoadedModel, stream: TokenStream, length: int) -> Measured:
    loss, n_tokens = evaluate_loaded(loaded, _some(blocks(stream, length)), _rows(length), length)
    return Measured(loss, n_tokens, stream.n_bytes, bits_per_byte(loss, n_tokens + 1, stream.n_bytes), stream.unknown)


def measure_validation_split(loaded: LoadedModel, run_dir: str, length: int) -> Measured:
    """Measure a run on all of its validation split; of conversations, on the tokens that are learned."""
    data = _own_tokens(loaded, run_dir)
    sequences = blocks([data.val], length)
    if data.is_chat:
        sequences = iter(validation_blocks(data, length, len(data.val), length_key="sequence_length"))
    loss, n_tokens = evaluate_loaded(loaded, _some(sequences), _rows(length), length)
    n_bytes = data.meta["val_bytes"]
    return Measured(loss, n_tokens, n_bytes, bits_per_byte(loss, data.val_targets, n_bytes), is_chat=data.is_chat)


def evaluate_loaded(
    loaded: LoadedModel, blocks: Iterable[Batch], rows: int = 8, context_length: int = 0
) -> tuple[float, int]:
    """Evaluate a loaded model on `blocks`, on every device that is here; returns as `evaluate` does.

    `context_length` is the blocks' (0: the model's).
    """
    strategy, eval_step = loaded.evaluation
    is_split = len(loaded.placement.devices) > 1
    params = loaded.params if is_split else strategy.place_state(loaded.params)
    return evaluate(strategy, eval_step, params, {}, blocks, rows, context_length or loaded.model.config.context_length)


def _rows(length: int) -> int:
    return max(1, min(8, 8192 // length))


def _own_tokens(loaded: LoadedModel, run_dir: str) -> TokenData:
    """Open the token directory that a run was trained on."""
    if loaded.step is None:
        raise UserError(f"{run_dir} is no run: it has no validation split. Name the text by --text_glob=GLOB.")
    loaded.config.out_dir = run_dir  # where the run is now: it may have been moved
    directory = token_directory(loaded.config)
    data = open_token_data(directory)
    if data.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{directory} holds tokens of another tokenizer ({data.tokenizer.vocab_size:,} ids) than the run's "
            f"({loaded.tokenizer.vocab_size:,} ids). They must be the same. Name the text itself by --text_glob=GLOB."
        )
    return data


def _some(found: Iterator[Batch]) -> Iterator[Batch]:
    """Return the same blocks; raise UserError when there are none."""
    first = next(found, None)
    if first is None:
        raise UserError("the text is too short. At least 2 tokens are needed: one to predict another. Give more text.")
    return chain([first], found)
