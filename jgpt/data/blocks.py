"""Text and ids cut into blocks for evaluation.

In the data path: beside `batches.py`, for text that is read once and in order.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from jgpt.data.batches import Batch
from jgpt.data.corpus import Corpus
from jgpt.data.tokenizer import Tokenizer


class TokenStream:
    """The ids of a corpus, piece by piece, an end-of-text id behind each document; counts the bytes passed."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus, self.tokenizer, self.n_bytes = corpus, tokenizer, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self.corpus.pieces():
            self.n_bytes += len(piece.text.encode("utf-8", "surrogatepass"))
            ids = self.tokenizer.encode(piece.text)
            yield np.append(ids, np.uint32(self.tokenizer.eot_id)) if piece.ends_document else ids


def blocks(pieces: Iterable[np.ndarray], context_length: int) -> Iterator[Batch]:
    """Cut a stream of ids into blocks of context_length + 1, neighbours sharing one id; the last may be shorter."""
    rest = np.zeros(0, np.int64)
    for piece in pieces:
        for start in range(0, len(piece), 1 << 20):  # a memmap is read a part at a time
            rest = np.concatenate([rest, piece[start : start + (1 << 20)]])
            while len(rest) > context_length:
                yield Batch(rest[: context_length + 1])
                rest = rest[context_length:]
    if len(rest) > 1:
        yield Batch(rest)
