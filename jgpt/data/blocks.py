"""Cut a stream of ids into blocks, for evaluation.

In the data path: beside `batches.py`, for text that is read once and in order.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from jgpt.data.batches import Batch
from jgpt.data.pieces import Piece
from jgpt.data.shards import Tokens
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.unknown import unknown_characters


class TokenStream:
    """The ids of a corpus: iterate, once, over arrays of uint32, with an end-of-text id after each document.

    `n_bytes` counts the text read so far, as UTF-8, `unknown` its characters that the vocabulary lacks.
    """

    def __init__(self, pieces: Iterable[Piece], tokenizer: Tokenizer) -> None:
        self.pieces, self.tokenizer, self.n_bytes = pieces, tokenizer, 0
        self.unknown: Counter[str] = Counter()

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self.pieces:
            self.n_bytes += len(piece.text.encode("utf-8", "surrogatepass"))
            ids = self.tokenizer.encode(piece.text)
            self.unknown += unknown_characters(self.tokenizer, piece.text, ids)
            yield np.append(ids, np.uint32(self.tokenizer.eot_id)) if piece.ends_document else ids


def blocks(pieces: Iterable[Tokens], sequence_length: int) -> Iterator[Batch]:
    """Cut a stream of ids into blocks of sequence_length + 1; the last may be shorter.

    A block begins with the last id of the block before it, so that every id but the first is predicted once.
    """
    rest = np.zeros(0, np.int64)
    for piece in pieces:
        for start in range(0, len(piece), 1 << 20):  # a part at a time, as a memmap may be larger than memory
            rest = np.concatenate([rest, piece[start : start + (1 << 20)]])
            while len(rest) > sequence_length:
                yield Batch(rest[: sequence_length + 1])
                rest = rest[sequence_length:]
    if len(rest) > 1:
        yield Batch(rest)
