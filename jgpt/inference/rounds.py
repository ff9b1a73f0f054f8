"""The two compiled calls of a round: `prefill` and `decode`.

In the data path: below `decode.py`, which decodes texts that begin together, and `batch.py`, where they come and go.

`prefill` runs each row's window (the end of its text) through the model at once, and draws the row's first new token.
`decode` is one `lax.while_loop`: it feeds each row its newest token and draws the next, until every row is done or has
filled the cache. Each row has positions, sampling rules, a seed and stop tokens of its own, so prompts of different
lengths and requests of different users share a batch.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgpt.errors import UserError
from jgpt.inference.sampling import EXCLUDED, Rules, sample
from jgpt.model.gpt import GPT, unembedding
from jgpt.model.kv_cache import KVCache, empty_cache
from jgpt.model.layers import product
from jgpt.model.precision import Policy, dtype_name

SMALLEST_BUCKET = 16
STREAM_STEPS = 4  # tokens of a row that are read at a time while they are made
UNLIMITED = 2**31 - 1  # steps of `decode`


class NonFiniteLogits(UserError):
    """The model's logits are inf or NaN, so no token can be drawn."""


class Task(NamedTuple):
    """The inputs of a round that do not change, for each row. None of them is a shape: other values compile nothing."""

    seed: Array | np.ndarray  # uint32 [B]
    row: Array | np.ndarray  # int32 [B]: the number of the text among those with the same seed
    start: Array | np.ndarray  # int32 [B]: the place in its whole text at which each row's window begins
    stop: Array | np.ndarray  # int32 [B]: the length of the window at which a row has enough tokens
    stop_ids: Array | np.ndarray  # int32 [B, a multiple of 4]: the ids that end a text, padded with -1
    n_ids: Array | np.ndarray  # int32 [B]: ids from here on are padding of the vocabulary
    rules: Rules


class Rows(NamedTuple):
    """The state of a round: the windows so far, with a cache of S positions."""

    tokens: Array  # int32 [B, S + 1]: the last one can be drawn, but not fed to the model
    length: Array  # int32 [B]: tokens so far; the newest is not yet fed to the model
    done: Array  # bool [B]: the row ended with a stop token, or has enough tokens
    finite: Array  # bool [B]: all logits of the row were finite while it was not done
    seen: Array | None  # bool [B, V]: the ids in the whole text so far; None without a repetition penalty
    cache: KVCache


def compute_variables(model: GPT, variables: Mapping[str, Any]) -> Any:
    """Return the variables on the devices, with matrices in the dtype that the model computes in."""
    cast = Policy(compute=model.dtype).cast_to_compute(variables)
    return jax.tree.map(jnp.asarray, cast)  # no device_put: it refuses arrays that several processes share


def stop_row(stop_ids: Sequence[int]) -> np.ndarray:
    """Return the ids that end a text as int32 [a multiple of 4], padded with -1: few lengths are compiled."""
    return np.array([*stop_ids, *[-1] * (-len(stop_ids) % 4)] or [-1] * 4, np.int32)


def without_stop(ids: list[int], stops: Sequence[int] | np.ndarray) -> list[int]:
    """Return the new ids of a row, without the stop token that ends them."""
    return ids[:-1] if ids and ids[-1] in stops else ids


def seen_ids(texts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """Mark the ids that each text holds: bool [B, V]."""
    seen = np.zeros((len(texts), vocab_size), bool)
    for row, text in zip(seen, texts, strict=True):
        row[list(text)] = True
    return seen


def bucket(n: int, most: int) -> int:
    """Round up to a power of two, at most `most`, so that few sizes are compiled.

    >>> bucket(5, 1024), bucket(100, 1024), bucket(900, 1000)
    (16, 128, 1000)
    """
    return min(most, max(SMALLEST_BUCKET, 1 << (n - 1).bit_length()))


def compilations() -> int:
    """Count the programs compiled for decoding so far; a time that includes a compilation says little about speed."""
    return sum(f._cache_size() for f in (prefill, decode))  # pyright: ignore[reportAttributeAccessIssue] (JAX's is private)


@partial(jax.jit, static_argnums=(0, 1))
def prefill(
    model: GPT,
    size: int,
    variables: Any,
    task: Task,
    tokens: Array,
    length: Array,
    seen: Array | None,
) -> Rows:
    """Run the windows through the model, and draw one token for each row.

    `tokens` int32 [B, P], padded on the right; `length` int32 [B]; `seen` bool [B, V] or None. The cache has `size`
    positions. The padding writes to it too, but a row overwrites these positions before it attends to them.
    """
    c, (batch, padded) = model.config, tokens.shape
    rows = Rows(
        tokens=jnp.pad(tokens, ((0, 0), (0, size + 1 - padded))),
        length=length,
        done=length >= task.stop,
        finite=jnp.ones(batch, bool),
        seen=seen,
        cache=empty_cache(c.n_layers, batch, size, c.n_kv_heads, c.d_head, model.dtype),
    )
    return _advance(model, variables, task, rows, tokens, None, length - 1)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(model: GPT, variables: Any, task: Task, rows: Rows, steps: Array | int) -> Rows:
    """Draw at most `steps` tokens for each row; stop when all rows are done or full, or any logits are not finite."""
    size = rows.tokens.shape[1] - 1

    def unfinished(carry: tuple[Rows, Array]) -> Array:
        rows, left = carry
        return jnp.any(~rows.done & (rows.length <= size)) & jnp.all(rows.finite) & (left > 0)

    def step(carry: tuple[Rows, Array]) -> tuple[Rows, Array]:
        rows, left = carry
        # A row that is done while others go on is fed its last token again, which changes nothing.
        position = jnp.minimum(rows.length - 1, size - 1)[:, None]
        newest = jnp.take_along_axis(rows.tokens, position, axis=1)
        last = jnp.zeros_like(rows.length)
        return _advance(model, variables, task, rows, newest, position, last), left - 1

    return jax.lax.while_loop(unfinished, step, (rows, jnp.asarray(steps, jnp.int32)))[0]


def _advance(
    model: GPT,
    variables: Any,
    task: Task,
    rows: Rows,
    fed: Array,
    positions: Array | None,
    last: Array,
) -> Rows:
    """Run `fed` int32 [B, T] at `positions` through the model, and draw the token after its column `last` [B]."""
    hidden, cache = cast(tuple[Array, KVCache], model.apply(variables, fed, positions, rows.cache))
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    matrix = unembedding(variables["params"])
    logits = product(hidden.astype(matrix.dtype), matrix, transposed=True, output_dtype=jnp.float32)
    going = ~rows.done & (rows.length < rows.tokens.shape[1])
    real = jnp.arange(logits.shape[1])[None, :] < jnp.asarray(task.n_ids)[:, None]
    finite = rows.finite & (~going | jnp.all(jnp.isfinite(logits) | ~real, axis=1))
    drawn = sample(_keys(task, rows.length), jnp.where(real, logits, EXCLUDED), task.rules, rows.seen)

    here = going[:, None] & (jnp.arange(rows.tokens.shape[1])[None, :] == rows.length[:, None])
    length = rows.length + going
    ends = jnp.any(drawn[:, None] == task.stop_ids, axis=1)
    done = rows.done | (going & (ends | (length >= task.stop)))
    seen = None if rows.seen is None else rows.seen.at[jnp.arange(len(drawn)), drawn].set(True)
    return Rows(jnp.where(here, drawn[:, None], rows.tokens), length, done, finite, seen, cache)


def _keys(task: Task, length: Array) -> Array:
    """Make each row's random key, [B], from its seed, its number and the place of the next token in its whole text."""

    def key(seed: Any, row: Any, place: Any) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), place)

    return jax.vmap(key)(task.seed, task.row, task.start + length)


def not_finite(model: GPT) -> str:
    """Return the message for logits that are not finite."""
    problem = f"the model's logits are inf or NaN (it computes in {dtype_name(model.dtype)}). Allowed: finite logits. "
    if model.dtype == jnp.float32:
        return problem + "The parameters are broken, as after a diverged training: take an earlier checkpoint (--step)."
    return problem + "Compute in fp32: precision.compute=fp32 in a config, --compute=fp32 as a flag."
