"""A preallocated cache of the keys and values of earlier tokens: a new token costs the work of one token.

In the data path: allocated by `inference/rounds.py`, filled by the blocks of `model/block.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LayerCache(NamedTuple):
    """The keys and the values of one layer, each [B, K, S, H]; S is the capacity in tokens.

    The tokens of a head are contiguous, as the products of attention read them. XLA would copy any other order at every
    step.
    """

    keys: Array
    values: Array

    def fill(self, k: Array, v: Array) -> "LayerCache":
        """Return the cache with `k` and `v` [B, T, K, H] at positions 0..T-1 of every row."""
        start = (0, 0, 0, 0)
        k, v = (x.swapaxes(1, 2).astype(self.keys.dtype) for x in (k, v))
        return LayerCache(
            jax.lax.dynamic_update_slice(self.keys, k, start), jax.lax.dynamic_update_slice(self.values, v, start)
        )

    def write(self, k: Array, v: Array, positions: Array) -> "LayerCache":
        """Return the cache with `k` and `v` [B, T, K, H] at `positions` int32 [B or 1, T] of each row.

        A token at a position past the capacity is not written. Positions that a row has not reached hold garbage: the
        mask hides them, and they are overwritten before the row reaches them.
        """
        # No index for the heads: where they are split over devices, each device writes its own heads.
        here = jnp.arange(k.shape[0])[:, None], slice(None), jnp.broadcast_to(positions, k.shape[:2])
        return LayerCache(
            self.keys.at[here].set(k.astype(self.keys.dtype), mode="drop"),
            self.values.at[here].set(v.astype(self.values.dtype), mode="drop"),
        )


KVCache = tuple[LayerCache, ...]


def empty_cache(n_layers: int, batch: int, length: int, n_kv_heads: int, d_head: int, dtype: Any) -> KVCache:
    """Allocate a cache of zeros, of `length` tokens for each of `batch` sequences."""
    shape = (batch, n_kv_heads, length, d_head)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_layers))
