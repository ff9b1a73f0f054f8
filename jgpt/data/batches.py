"""Make batches of tokens: a pure function of (seed, step).

An epoch visits every block of tokens once, or every row of whole conversations, in a shuffled order. Resuming needs
only the step, and the order does not depend on how many devices share a batch. In the data path: after
`token_files.py` and `packing.py`, before `step/`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jgpt.data.packing import Rows, pack_rows
from jgpt.data.shards import Tokens
from jgpt.data.token_files import TokenData
from jgpt.data.words import BEGINS, IDS, LEARNED
from jgpt.errors import UserError


class Batch(NamedTuple):
    """Sequences in which each token predicts the next; arrays of numpy or JAX, with any leading dimensions."""

    tokens: Any  # int32 [..., T+1]: inputs [..., :-1], targets [..., 1:]
    weights: Any = None  # fp32 [..., T], of the targets' losses; None: all 1
    segments: Any = None  # int32 [..., T], the number of the text that an input belongs to; None: one text a row


def _random(seed: int, epoch: int, n: int) -> np.ndarray:
    # Raw Philox numbers under an explicit key are the same in every numpy; Generator.permutation need not be.
    key = np.array([seed % (1 << 64), epoch], np.uint64)
    return np.random.Philox(key=key).random_raw(n)


@lru_cache(maxsize=2)
def block_order(seed: int, epoch: int, n_blocks: int) -> np.ndarray:
    """Return the order of the blocks in an epoch: a permutation of range(n_blocks), int64, read-only.

    >>> block_order(1, 0, 6).tolist() == block_order(1, 1, 6).tolist(), sorted(block_order(1, 0, 6).tolist())
    (False, [0, 1, 2, 3, 4, 5])
    """
    order = np.argsort(_random(seed, epoch, n_blocks + 1)[1:], kind="stable")
    order.flags.writeable = False  # every caller gets the cached array itself
    return order


@lru_cache(maxsize=2)
def block_offset(seed: int, epoch: int, sequence_length: int) -> int:
    """Return the first token of an epoch's first block, in [0, sequence_length): each epoch cuts the text elsewhere."""
    return int(_random(seed, epoch, 1)[0] % np.uint64(sequence_length))


@dataclass(frozen=True)
class Batches:
    """The training batches of a text (T = sequence_length, G = global_batch_size). `tokens` [n], n at least 2 T."""

    tokens: Tokens
    seed: int
    global_batch_size: int
    sequence_length: int
    vocab_size: int

    @property
    def n_blocks(self) -> int:
        """Blocks in an epoch. One sequence less than the tokens hold, because an epoch's first block has an offset."""
        return len(self.tokens) // self.sequence_length - 1

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that an epoch predicts."""
        return self.n_blocks * self.sequence_length

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the batch of a step: tokens int32 [G, T+1]; or some of its rows, which alone are read.

        Raises UserError when an id is not in the vocabulary.
        """
        first = step * self.global_batch_size
        batch = np.stack([self._block(index) for index in range(first, first + self.global_batch_size)[rows]])
        _check_ids(batch, self.vocab_size)
        return Batch(batch.astype(np.int32))

    def _block(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.n_blocks)
        block = block_order(self.seed, epoch, self.n_blocks)[position]
        start = block_offset(self.seed, epoch, self.sequence_length) + block * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1]


@dataclass(frozen=True)
class ChatBatches:
    """The training batches of conversations: packed rows, of which the assistant's answers are learned."""

    rows: Rows
    seed: int
    global_batch_size: int
    vocab_size: int

    @property
    def n_blocks(self) -> int:
        """Rows in an epoch."""
        return len(self.rows)

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in an epoch's rows, with those that are not learned."""
        return self.n_blocks * (self.rows.capacity - 1)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the batch of a step: tokens int32 [G, T+1], weights fp32 [G, T], segments int32 [G, T]; or some rows.

        The weights of the whole batch have mean 1. So the mean of the weighted losses is the mean over the learned
        targets, however the batch is divided among devices and micro-batches. Raises UserError when an id is not in the
        vocabulary.
        """
        first = step * self.global_batch_size
        everything = [self._row(index) for index in range(first, first + self.global_batch_size)]
        tokens, weights, segments = (np.stack(arrays) for arrays in zip(*everything, strict=True))
        _check_ids(tokens, self.vocab_size)
        mean = max(float(weights.mean(dtype=np.float64)), 1e-9)
        return Batch(tokens[rows], (weights / np.float32(mean))[rows], segments[rows])

    def _row(self, index: int) -> Batch:
        epoch, position = divmod(index, self.n_blocks)
        return chat_row(self.rows, block_order(self.seed, epoch, self.n_blocks)[position])


def chat_row(rows: Rows, index: int) -> Batch:
    """Return a packed row as one sequence: tokens int32 [T+1], weights fp32 [T], segments int32 [T].

    A weight is 1 where the target is learned, else 0.
    """
    words, numbers = rows.row(index)
    learned = (words & (LEARNED | BEGINS)) == LEARNED  # a conversation's first token has no input
    return Batch((words & IDS).astype(np.int32), learned[1:].astype(np.float32), numbers[:-1])


def _check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    if (highest := int(tokens.max())) >= vocab_size:  # a device would read NaN there, without an error
        raise UserError(
            f"the training tokens hold the id {highest}. Allowed: 0 to {vocab_size - 1}. They are damaged, or of "
            "another tokenizer. Delete the token directory; the next run makes a new one."
        )


def make_batches(
    data: TokenData, seed: int, global_batch_size: int, sequence_length: int, vocab_size: int, *, length_key: str
) -> Batches | ChatBatches:
    """Return the training batches of a token directory: of its text, or of its conversations.

    `length_key` is the config key that `sequence_length` comes from. Raises UserError, with this key, when the tokens
    are too few for one sequence.
    """
    if data.is_chat:
        rows = pack_rows(data.train, sequence_length + 1, "training", length_key)
        return ChatBatches(rows, seed, global_batch_size, vocab_size)
    if len(data.train) < 2 * sequence_length:
        raise UserError(
            f"{length_key} is {sequence_length}, and the training text has {len(data.train):,} tokens. At least "
            f"{2 * sequence_length:,} are needed. Set a smaller {length_key}, or give more text."
        )
    return Batches(data.train, seed, global_batch_size, sequence_length, vocab_size)


def validation_blocks(data: TokenData, sequence_length: int, max_sequences: int, *, length_key: str) -> list[Batch]:
    """Return at most `max_sequences` sequences, spread evenly over the validation tokens; each is one row of a batch.

    Of conversations the weights are 1 and 0; a text has none. `length_key` is the config key that `sequence_length`
    comes from. Raises UserError, with this key, when the tokens are too few for one sequence.
    """
    if data.is_chat:
        rows = pack_rows(data.val, sequence_length + 1, "validation", length_key)
        return [chat_row(rows, index) for index in _evenly(len(rows), max_sequences)]
    n_blocks = (len(data.val) - 1) // sequence_length
    if n_blocks < 1:
        raise UserError(
            f"{length_key} is {sequence_length}, and the validation text has {len(data.val):,} tokens. At least "
            f"{sequence_length + 1:,} are needed. Set a smaller {length_key} or a larger data.val_fraction, or give "
            "more text."
        )
    starts = _evenly(n_blocks, max_sequences) * sequence_length
    return [Batch(data.val[start : start + sequence_length + 1].astype(np.int32)) for start in starts]


def _evenly(n: int, at_most: int) -> np.ndarray:
    """Choose at most `at_most` numbers of range(n), evenly spaced."""
    chosen = min(n, at_most)
    return np.arange(chosen) * n // chosen
