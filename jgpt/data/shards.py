"""The tokens of a split as one array, whatever number of files they are in.

In the data path: `token_files.py` maps the files and joins them here; `batches.py`, `packing.py` and `blocks.py` read.
"""

from bisect import bisect_right
from itertools import accumulate

import numpy as np


class ShardedTokens:
    """Tokens [n] that lie in several arrays, one after the other; only slices of them are read.

    >>> tokens = ShardedTokens([np.arange(3), np.arange(3, 5)])
    >>> len(tokens), tokens[1:4], tokens[-1:]
    (5, array([1, 2, 3]), array([4]))
    """

    def __init__(self, shards: list[np.ndarray]) -> None:
        # Slices of a memmap are memmaps, which take several times as long to make as those of a plain array.
        self.shards = [shard.view(np.ndarray) for shard in shards]
        self.dtype = shards[0].dtype
        self._ends = list(accumulate(map(len, shards)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return a part: a view where it is in one shard, a copy where it crosses a border."""
        start, stop, step = part.indices(len(self))
        assert step == 1, "a part of a token file has no steps"
        place = min(bisect_right(self._ends, start), len(self.shards) - 1)
        begin = self._ends[place] - len(self.shards[place])
        if stop <= self._ends[place]:
            return self.shards[place][start - begin : max(start, stop) - begin]
        found = []
        while start < stop:
            begin = self._ends[place] - len(self.shards[place])
            found.append(self.shards[place][start - begin : stop - begin])
            start, place = self._ends[place], place + 1
        return np.concatenate(found)


Tokens = np.ndarray | ShardedTokens  # [n]: uint16 or uint32


def join_shards(shards: list[np.ndarray], dtype: np.dtype) -> Tokens:
    """Return the tokens of the shards of a split: of one shard the array itself."""
    if len(shards) > 1:
        return ShardedTokens(shards)
    return shards[0] if shards else np.zeros(0, dtype)
