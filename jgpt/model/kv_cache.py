"""The keys and values of the tokens so far, preallocated, so that a new token costs one token's work.

In the data path: made by `inference/decode.py`, filled by the blocks of `model/gpt.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class LayerCache(NamedTuple):
    """One layer's keys and values: each [B, K, S, H], S the most tokens that it can hold.

    A head's tokens lie together, as the products of attention read them: any other order is copied at every step.
    """

    keys: Array
    values: Array

    def fill(self, k: Array, v: Array) -> "LayerCache":
        """Put `k` and `v` [B, T, K, H] at positions 0..T-1 of every row."""
        start = (0, 0, 0, 0)
        k, v = (x.swapaxes(1, 2).astype(self.keys.dtype) for x in (k, v))
        return LayerCache(
            jax.lax.dynamic_update_slice(self.keys, k, start), jax.lax.dynamic_update_slice(self.values, v, start)
        )

    def write(self, k: Array, v: Array, positions: Array) -> "LayerCache":
        """Put `k` and `v` [B, T, K, H] at `positions` int32 [B or 1, T] of each row.

        A position past the end is dropped. What a row holds at positions that it has not reached is garbage, which
        no query sees: it is masked by position, and overwritten before it comes into view.
        """
        # No index for the heads: where they are split over devices, each writes its own.
        here = jnp.arange(k.shape[0])[:, None], slice(None), jnp.broadcast_to(positions, k.shape[:2])
        return LayerCache(
            self.keys.at[here].set(k.astype(self.keys.dtype), mode="drop"),
            self.values.at[here].set(v.astype(self.values.dtype), mode="drop"),
        )


KVCache = tuple[LayerCache, ...]


def empty_cache(n_layers: int, batch: int, length: int, n_kv_heads: int, d_head: int, dtype: Any) -> KVCache:
    """Allocate a cache of `length` tokens for `batch` sequences."""
    shape = (batch, n_kv_heads, length, d_head)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_layers))
