"""Tokens to batches: the last step of the data path before the model, a pure function of (seed, step).

An epoch is a no-repeat shuffled order of blocks of tokens, or of rows of whole conversations; resuming needs no state
but the step, and the order does not depend on how many devices share a batch. Before: `token_files.py` and
`packing.py`; after: `step/`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jgpt.data.conversations import BEGINS, IDS, LEARNED
from jgpt.data.packing import Rows, pack_rows
from jgpt.data.token_files import TokenData
from jgpt.errors import UserError


class Batch(NamedTuple):
    """Sequences of tokens, each predicting the next; numpy's arrays or JAX's, with any leading dimensions."""

    tokens: Any  # int32 [..., T+1]: inputs [..., :-1], targets [..., 1:]
    weights: Any = None  # fp32 [..., T], of the targets' losses; None: all 1
    segments: Any = None  # int32 [..., T], numbers the texts that share a row, none of which sees another; None: one


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
    order.flags.writeable = False  # the cache hands out the array itself
    return order


@lru_cache(maxsize=2)
def block_offset(seed: int, epoch: int, context_length: int) -> int:
    """Return where an epoch's first block begins, in [0, context_length): each epoch sees other windows of the text."""
    return int(_random(seed, epoch, 1)[0] % np.uint64(context_length))


@dataclass(frozen=True)
class Batches:
    """The training batches over a 1-D array of tokens (T = context_length, G = global_batch_size)."""

    tokens: np.ndarray
    seed: int
    global_batch_size: int
    context_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.n_blocks < 1:
            raise UserError(
                f"model.context_length is {self.context_length} and the training text has {len(self.tokens):,} tokens. "
                f"At least {2 * self.context_length:,} are needed. Shorten the context, or give more text."
            )

    @property
    def n_blocks(self) -> int:
        """Blocks in an epoch; one context is held back, as the epochs' offsets need room."""
        return (len(self.tokens) - self.context_length) // self.context_length

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that an epoch predicts."""
        return self.n_blocks * self.context_length

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: tokens int32 [G, T+1].

        Raises UserError when the tokens hold an id past the vocabulary.
        """
        first = step * self.global_batch_size
        batch = np.stack([self._block(index) for index in range(first, first + self.global_batch_size)])
        _check_ids(batch, self.vocab_size)
        return Batch(batch.astype(np.int32))

    def _block(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.n_blocks)
        block = block_order(self.seed, epoch, self.n_blocks)[position]
        start = block_offset(self.seed, epoch, self.context_length) + block * self.context_length
        return self.tokens[start : start + self.context_length + 1]


@dataclass(frozen=True)
class ChatBatches:
    """The training batches over rows of conversations, of which the answers are learned; else as `Batches`."""

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
        """Targets in an epoch's rows, those that are not learned included."""
        return self.n_blocks * (self.rows.capacity - 1)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: tokens int32 [G, T+1], weights fp32 [G, T], segments int32 [G, T].

        The weights have mean 1, so that the mean of weighted losses, however the batch is shared out, is that of the
        learned targets. Raises UserError when the tokens hold an id past the vocabulary.
        """
        first = step * self.global_batch_size
        rows = [self._row(index) for index in range(first, first + self.global_batch_size)]
        tokens, weights, segments = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        _check_ids(tokens, self.vocab_size)
        mean = max(float(weights.mean(dtype=np.float64)), 1e-9)
        return Batch(tokens, weights / np.float32(mean), segments)

    def _row(self, index: int) -> Batch:
        epoch, position = divmod(index, self.n_blocks)
        return chat_row(self.rows, block_order(self.seed, epoch, self.n_blocks)[position])


def chat_row(rows: Rows, index: int) -> Batch:
    """Return a packed row as one sequence, its weights 1 where a target is learned and 0 elsewhere."""
    words, numbers = rows.row(index)
    learned = (words & (LEARNED | BEGINS)) == LEARNED  # nothing before it leads to a conversation's first token
    return Batch((words & IDS).astype(np.int32), learned[1:].astype(np.float32), numbers[:-1])


def _check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    if (highest := int(tokens.max())) >= vocab_size:  # on a device it would be clamped, and train on silently
        raise UserError(
            f"the training tokens hold the id {highest}, and the vocabulary ends at {vocab_size - 1}. They "
            "are damaged or of another tokenizer. Delete the token directory; the next run makes it anew."
        )


def make_batches(
    data: TokenData, seed: int, global_batch_size: int, context_length: int, vocab_size: int
) -> Batches | ChatBatches:
    """Return the training batches over a token directory, in its own format.

    Raises UserError when there is not even one sequence.
    """
    if data.is_chat:
        rows = pack_rows(data.train, context_length + 1, "training")
        return ChatBatches(rows, seed, global_batch_size, vocab_size)
    return Batches(data.train, seed, global_batch_size, context_length, vocab_size)


def validation_blocks(data: TokenData, context_length: int, max_sequences: int) -> list[Batch]:
    """Return at most `max_sequences` sequences, spread evenly over the validation tokens: each one row of a batch.

    Their weights, where they have any, are 1 and 0. Raises UserError when there is not even one.
    """
    if data.is_chat:
        rows = pack_rows(data.val, context_length + 1, "validation")
        return [chat_row(rows, index) for index in _spread(len(rows), max_sequences)]
    n_blocks = (len(data.val) - 1) // context_length
    if n_blocks < 1:
        raise UserError(
            f"model.context_length is {context_length} and the validation text has {len(data.val):,} tokens. At least "
            f"{context_length + 1:,} are needed. Shorten the context, raise data.val_fraction, or give more text."
        )
    starts = _spread(n_blocks, max_sequences) * context_length
    return [Batch(data.val[start : start + context_length + 1].astype(np.int32)) for start in starts]


def _spread(n: int, at_most: int) -> np.ndarray:
    """Choose at most so many of range(n), evenly."""
    chosen = min(n, at_most)
    return np.arange(chosen) * n // chosen
