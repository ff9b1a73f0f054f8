"""A batch whose rows come and go: each begins as soon as there is a place for it, while the others go on.

In the data path: beside `decode.py`, above `rounds.py`; `jgpt.serve` is the caller. A row gets the
ids that `generate` would give it alone: the same seed, the same text. (Sums may be rounded differently in a larger
batch, as everywhere.)

A new row is run through the model alone (`prefill`), and its cache is copied into the batch. So no other row is
computed again. The batch has as many rows as are needed, rounded up to a power of two, and a cache as long as the
longest row needs, rounded up to a power of four: few sizes are compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgpt.inference.rounds import (
    STREAM_STEPS,
    Rows,
    Task,
    bucket,
    compute_variables,
    decode,
    not_finite,
    prefill,
    seen_ids,
    stop_row,
    without_stop,
)
from jgpt.inference.sampling import Sampling
from jgpt.model.gpt import GPT
from jgpt.model.kv_cache import LayerCache

SMALLEST_CACHE = 256


class Slots(NamedTuple):
    """The rows of a batch on the device: B of them, with a cache of S positions each."""

    rows: Rows
    task: Task


@dataclass(eq=False)
class Row:
    """A text that is continued: what is asked, and the ids so far."""

    ids: list[int]  # the prompt, and behind it what was drawn (with the stop token)
    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    number: int = 0  # among the texts with this seed
    stop_ids: tuple[int, ...] = ()
    slides: bool = False  # a text that fills the context goes on with the newer half in view; else it ends
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.ids)

    @property
    def n_new(self) -> int:
        """Ids drawn so far."""
        return len(self.ids) - self.n_prompt


class News(NamedTuple):
    """What is new of a row: the ids without the stop token; why it ended ("stop", "length"), or ""; what went wrong."""

    row: Row
    ids: list[int]
    end: str
    error: str = ""


class Batch:
    """The rows that are decoded together. For one thread; `add`, `remove` and `step` in any order."""

    def __init__(
        self,
        model: GPT,
        variables: Mapping[str, Any],
        *,
        n_ids: int,
        most_rows: int,
        most_stop_ids: int,
        context_length: int = 0,
    ) -> None:
        """Ids from `n_ids` on are never drawn. Up to `most_rows` are decoded at a time.

        Rows have up to `most_stop_ids`, and see at most `context_length` tokens (0: the model's own).
        """
        self.model, self.n_ids, self.most_rows, self.most_stop_ids = model, n_ids, most_rows, most_stop_ids
        self.context = min(context_length or model.config.context_length, model.config.context_length)
        self._variables = compute_variables(model, variables)
        self._slots: Slots | None = None
        self._places: list[Row | None] = []  # the row at each place of the batch
        self._read: dict[Row, int] = {}  # how many tokens of its window have been read

    def __len__(self) -> int:
        return len(self._read)

    @property
    def is_full(self) -> bool:
        """Tell whether no row can be added now."""
        return len(self) >= self.most_rows

    def add(self, row: Row) -> None:
        """Begin a row, which has a prompt and wants a token or more. The next `step` returns its first token."""
        assert not self.is_full and row.ids and row.max_new_tokens > 0
        if len(self) == len(self._places):
            self._arrange(len(self) + 1)
        self._begin(row, self._places.index(None), self.context)

    def remove(self, row: Row) -> None:
        """Stop a row, if it is not done yet, and free its place."""
        if row in self._read:
            self._free([row])

    def clear(self) -> None:
        """Forget all rows, and free their memory."""
        self._slots, self._places, self._read = None, [], {}

    def step(self) -> list[News]:
        """Return what is new of each row, and begin to draw up to STREAM_STEPS more tokens for those that go on."""
        if self._slots is None:
            return []
        tokens, lengths, done, finite = jax.device_get(self._slots.rows[:4])
        news, ended, full = [], [], []
        for place, row in enumerate(self._places):
            if row is None:
                continue
            new = tokens[place, self._read[row] : lengths[place]].tolist()
            self._read[row] = int(lengths[place])
            row.ids += new
            shown, end = without_stop(new, row.stop_ids), ""
            if not finite[place]:
                end = "error"
            elif done[place]:
                end = "stop" if len(shown) < len(new) else "length"
            elif lengths[place] > self.context:
                full.append(row)
                end = "" if row.slides else "length"
            if new or end:
                news.append(News(row, shown, end, not_finite(self.model) if end == "error" else ""))
            ended += [row] if end else []
        self._free(ended)
        for row in full:
            if row in self._read:  # the newer half of the window stays in view
                self._begin(row, self._places.index(row), max(1, self.context // 2))
        self._advance()
        return news

    def _begin(self, row: Row, place: int, keep: int) -> None:
        """Run the last `keep` ids of a row through the model, and put the result at a place of the batch."""
        window = row.ids[-keep:]
        start = len(row.ids) - len(window)
        size = bucket(len(window), self.context)
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(window)] = window
        one = self._task(row, start)
        seen = seen_ids([row.ids], self.model.config.vocab_size)
        rows = prefill(self.model, size, self._variables, one, tokens, np.array([len(window)], np.int32), seen)
        self._places[place], self._read[row] = row, len(window)
        if self._slots is None:
            index, size = np.zeros(len(self._places), np.int32), self._cache_size(len(window) + 1)
            self._slots = _arranged(Slots(rows, one), index, self._alive, size)
        else:
            self._lengthen(len(window) + 1)
            self._slots = _joined(self._slots, Slots(rows, one), place)

    def _task(self, row: Row, start: int) -> Task:
        stops = np.full(self.most_stop_ids, -1)
        stops[: len(row.stop_ids)] = row.stop_ids
        return Task(
            seed=np.array([row.seed], np.uint32),
            row=np.array([row.number], np.int32),
            start=np.array([start], np.int32),
            stop=np.array([row.n_prompt + row.max_new_tokens - start], np.int32),
            stop_ids=stop_row(stops.tolist())[None, :],
            n_ids=np.array([self.n_ids], np.int32),
            rules=row.sampling.rules(1),
        )

    def _advance(self) -> None:
        if self._slots is None:
            return
        self._lengthen(max(self._read.values()) + STREAM_STEPS)
        slots = self._slots
        self._slots = slots._replace(rows=decode(self.model, self._variables, slots.task, slots.rows, STREAM_STEPS))

    @property
    def _alive(self) -> np.ndarray:
        return np.array([row is not None for row in self._places])

    def _free(self, rows: list[Row]) -> None:
        """Free the places of rows, and make the batch smaller where most of it is free."""
        if not rows:
            return
        for row in rows:
            del self._read[row]
        self._places = [row if row in self._read else None for row in self._places]
        if not self._read:
            self._slots, self._places = None, []  # the memory of the cache, too
        elif len(self) * 4 <= len(self._places):
            self._arrange(len(self))
        elif self._slots is not None:
            self._slots = self._slots._replace(rows=_ended(self._slots.rows, self._alive))

    def _arrange(self, n: int) -> None:
        """Give the batch places for `n` rows."""
        n_places = min(self.most_rows, 1 << (n - 1).bit_length())
        taken = [place for place, row in enumerate(self._places) if row is not None]
        self._places = [*(self._places[place] for place in taken), *[None] * (n_places - len(taken))]
        if self._slots is not None:
            index = np.array([*taken, *[0] * (n_places - len(taken))], np.int32)
            self._slots = _arranged(self._slots, index, self._alive, self._size)

    @property
    def _size(self) -> int:
        assert self._slots is not None
        return self._slots.rows.tokens.shape[1] - 1

    def _cache_size(self, n_tokens: int) -> int:
        size = SMALLEST_CACHE
        while size < n_tokens:
            size *= 4
        return min(size, self.context)

    def _lengthen(self, n_tokens: int) -> None:
        """Make the cache long enough for rows of `n_tokens`, as far as the context goes."""
        if self._size < min(n_tokens, self.context):
            assert self._slots is not None
            index = np.arange(len(self._places), dtype=np.int32)
            self._slots = _arranged(self._slots, index, self._alive, self._cache_size(n_tokens))


@partial(jax.jit, donate_argnums=0)
def _joined(slots: Slots, one: Slots, place: Array | int) -> Slots:
    """Put a batch of one row, whose cache may be shorter, at a place of a larger batch."""

    def put(there: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(there, new.astype(there.dtype), (place, *[0] * (there.ndim - 1)))

    return jax.tree.map(put, slots, one)


@partial(jax.jit, static_argnums=3)
def _arranged(slots: Slots, index: Array | np.ndarray, alive: Array | np.ndarray, size: int) -> Slots:
    """Take the rows at `index` int32 [B], those of `alive` bool [B] as they are; give the cache `size` positions."""
    rows, task = jax.tree.map(lambda x: jnp.asarray(x)[index], slots)

    def longer(x: Array, axis: int, length: int) -> Array:
        return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])

    cache = tuple(LayerCache(longer(c.keys, 2, size), longer(c.values, 2, size)) for c in rows.cache)
    rows = rows._replace(tokens=longer(rows.tokens, 1, size + 1), cache=cache)
    return Slots(_ended(rows, alive), task)


@partial(jax.jit, donate_argnums=0)
def _ended(rows: Rows, alive: Array | np.ndarray) -> Rows:
    """Let the rows that are not `alive` rest."""
    return rows._replace(done=rows.done | ~alive, finite=rows.finite | ~alive)
