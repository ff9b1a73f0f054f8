"""Conversations of a token file to rows of one length: whole, side by side, as few rows as can be.

Before in the data path: the words of `conversations.py`; after: `batches.py`, which shuffles the rows.
"""

import logging
from dataclasses import dataclass

import numpy as np

from jgpt.data.conversations import BEGINS, LEARNED
from jgpt.errors import UserError

SCAN_WORDS = 1 << 22  # of a token file at a time
log = logging.getLogger("jgpt")


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Share out items over rows that hold `capacity`, the longest first, each to the fullest row with room for it.

    That is best-fit decreasing: never much more than 11/9 of the fewest rows possible (Johnson et al. 1974). Returns
    the items in the order of their rows, and where each row begins among them (one more: the end).

    >>> pack(np.array([3, 5, 2, 4]), 7)
    (array([1, 2, 0, 3]), array([0, 2, 4]))
    """
    row_of = np.zeros(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some row has room for r: finding the least room that is enough takes no search
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
    """Packed rows of `capacity` words: which conversations, by their place in a token file, lie in each."""

    words: np.ndarray  # uint32, the token file
    capacity: int
    begins: np.ndarray  # of the conversations in `words`, row by row
    lengths: np.ndarray  # of the same, cut to the capacity
    first: np.ndarray  # the place of each row's first conversation in these two, and their length

    def __len__(self) -> int:
        return len(self.first) - 1

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's words, uint32 [capacity] with zeros behind, and the number of the conversation of each.

        The zeros are numbered as one more conversation.
        """
        words, numbers = np.zeros(self.capacity, np.uint32), np.zeros(self.capacity, np.int32)
        end = 0
        for i in range(self.first[index], self.first[index + 1]):
            begin, end = end, end + self.lengths[i]
            words[begin:end] = self.words[self.begins[i] : self.begins[i] + self.lengths[i]]
            numbers[end:] += 1
        return words, numbers


def pack_rows(words: np.ndarray, capacity: int, split: str) -> Rows:
    """Pack the conversations of a token file, each cut to `capacity`, and say how it went.

    Those whose first answer lies behind the cut are left out. Raises UserError when none remains.
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
            f"none of the {len(keep):,} {split} conversations has an answer within its first {capacity - 1:,} tokens, "
            "which is all that a sequence holds. Set a larger --config.batch.sequence_length or model.context_length."
        )
    order, first = pack(lengths, capacity)
    full = 100 * lengths.sum() / (capacity * (len(first) - 1))
    log.info("%s: %s conversations in %s rows, %.0f%% full", split, f"{len(begins):,}", f"{len(first) - 1:,}", full)
    if len(long):
        log.warning(
            "%s: %s conversations are longer than a sequence of %s tokens: %s are cut there, and %s, whose first answer"
            " lies behind that, left out", split, f"{len(long):,}", f"{capacity - 1:,}",
            f"{len(long) - len(unanswered):,}", f"{len(unanswered):,}",
        )  # fmt: skip
    return Rows(words, capacity, begins[order], lengths[order], first)


def _begins(words: np.ndarray) -> np.ndarray:
    found = [
        start + np.flatnonzero(words[start : start + SCAN_WORDS] & BEGINS) for start in range(0, len(words), SCAN_WORDS)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])
