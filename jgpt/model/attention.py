"""Attention: queries, keys and values in, mixed values out; and the rotary position embedding.

In the data path: called by every block of `model/gpt.py`, whose legend names the dimensions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

CHUNKS = 4  # of the queries in causal attention; 8 do less work in smaller, slower products


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotate heads by their position, halves paired as in Llama (Su et al., arXiv 2104.09864).

    `x` [B, T, ..., H], `positions` int32 [B or 1, T]; computed in fp32, returned in x's dtype.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]  # [B, T, H/2]
    angles = jnp.expand_dims(angles, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(
    q: Array, k: Array, v: Array, mask: Array, drop: Callable[[Array], Array] = lambda weights: weights
) -> Array:
    """Softmax attention with grouped key/value heads.

    `q` [B, T, K, G, H] (G query heads share each of the K key/value heads), `k` and `v` [B, S, K, H],
    `mask` bool [B or 1, T, S], true where a query may look. Softmax in fp32. `drop` is dropout on the weights.
    Returns [B, T, K, G, H] in v's dtype.
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # before the product, so that fp16 scores stay in range
    # The product leaves in the compute dtype and is cast after: asking the GEMM itself for fp32 would make the
    # GEMMs of its backward pass fp32 ones, which a T4 runs without tensor cores.
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k).astype(jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)


def attend_causally(
    q: Array, k: Array, v: Array, mask: Array, drop: Callable[[Array], Array] = lambda weights: weights
) -> Array:
    """Do the same for a sequence that attends to itself (S = T), where no query looks past its own place.

    The queries go in four pieces, each with the keys up to its end only: 5/8 of the work and memory of all pairs.
    """
    length = q.shape[1]
    size = -(-length // CHUNKS)
    pieces = []
    for start in range(0, length, size):
        end = min(start + size, length)
        pieces.append(attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end], drop))
    return jnp.concatenate(pieces, axis=1)
