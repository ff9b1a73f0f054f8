"""Pack the conversations of a split into rows of one length, each conversation whole, in few rows.

In the data path: after `conversations.py`, whose words it reads; before `batches.py`, which shuffles the rows.
"""

import logging
from dataclasses import dataclass

import numpy as np

from jgpt.data.shards import Tokens
from jgpt.data.words import BEGINS, LEARNED
from jgpt.errors import UserError

SCAN_WORDS = 1 << 22  # words of a split that are read at a time
log = logging.getLogger("jgpt")


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Put items into rows of `capacity`: the longest item first, each into the fullest row that has room for it.

    This is best-fit decreasing, which takes at most about 11/9 of the fewest rows possible (Johnson et al. 1974).
    Returns the items in the order of their rows, and the place of each row's first item among them, with the number of
    items as a last entry; both int64.

    >>> pack(np.array([3, 5, 2, 4]), 7)
    (array([1, 2, 0, 3]), array([0, 2, 4]))
    """
    row_of = np.zeros(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some row has room for r: the smallest room that is enough is one bit operation
    n_rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for item, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, n_rows = n_rows, capacity, n_rows + 1
        row_of[item] = row
        rows_with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(n_rows + 1))


@dataclass(frozen=True)
class Rows:
    """Packed rows: which conversations of a split each row holds."""

    words: Tokens  # uint32, of a split
    capacity: int  # words of a row
    begins: np.ndarray  # int64: where in `words` each conversation begins, in the order of the rows
    lengths: np.ndarray  # int64: its words, at most `capacity`
    first: np.ndarray  # int64: the index in `begins` of each row's first conversation, then the length of `begins`

    def __len__(self) -> int:
        return len(self.first) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's words, uint32 [capacity], and the number of each word's conversation, int32 [capacity].

        Zeros fill the row up; they are numbered as one more conversation.
        """
        words, numbers = np.zeros(self.capacity, np.uint32), np.zeros(self.capacity, np.int32)
        end = 0
        for i in range(self.first[index], self.first[index + 1]):
            begin, end = end, end + self.lengths[i]
            words[begin:end] = self.words[self.begins[i] : self.begins[i] + self.lengths[i]]
            numbers[end:] += 1
        return words, numbers


def pack_rows(words: Tokens, capacity: int, split: str, length_key: str) -> Rows:
    """Pack the conversations of a split into rows of `capacity` words, and log how full the rows are.

    A longer conversation is cut; one without an answer before the cut is left out. `split` ("training", "validation")
    and `length_key`, the config key that sets the capacity, are for messages. Raises UserError when no conversation
    remains.
    """
    begins = _begins(words)
    lengths = np.diff(np.append(begins, len(words)))
    long = np.flatnonzero(lengths > capacity)
    heads = ((i, words[begins[i] + 1 : begins[i] + capacity]) for i in long)
    unanswered = [i for i, head in heads if not (head & LEARNED).any()]
    keep = np.ones(len(begins), bool)
    keep[unanswered] = False
    begins, lengths = begins[keep], np.minimum(lengths[keep], capacity)
    if not len(begins):
        raise UserError(
            f"{length_key} is {capacity - 1}, and none of the {len(keep):,} {split} conversations has an answer within "
            f"its first {capacity - 1} tokens. At least one must have. Set a larger {length_key}."
        )
    order, first = pack(lengths, capacity)
    full = 100 * lengths.sum() / (capacity * (len(first) - 1))
    log.info("%s: %s conversations in %s rows, %.0f%% full", split, f"{len(begins):,}", f"{len(first) - 1:,}", full)
    if len(long):
        log.warning(
            "%s: %s conversations are longer than a sequence of %s tokens: %s are cut there, and %s are left out,"
            " because their first answer comes after the cut", split, f"{len(long):,}", f"{capacity - 1:,}",
            f"{len(long) - len(unanswered):,}", f"{len(unanswered):,}",
        )  # fmt: skip
    return Rows(words, capacity, begins[order], lengths[order], first)


def _begins(words: Tokens) -> np.ndarray:
    parts = [
        start + np.flatnonzero(words[start : start + SCAN_WORDS] & BEGINS) for start in range(0, len(words), SCAN_WORDS)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])
