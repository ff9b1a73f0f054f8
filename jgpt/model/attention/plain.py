"""Attention: queries, keys and values in, mixed values out.

In the data path: called by every block of `model/gpt.py`, whose legend names the dimensions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    drop: Callable[[Array], Array] = lambda weights: weights,
    scores_dtype: Any = None,
) -> Array:
    """Softmax attention with grouped key/value heads.

    `q` [B, T, K, G, H] (G query heads share each of the K key/value heads), `k` and `v` [B, S, K, H],
    `mask` bool [B or 1, T, S], true where a query may look. Softmax in fp32. `drop` is dropout on the weights.
    The scores leave the product in `scores_dtype`, by default that of q. Returns [B, T, K, G, H] in v's dtype.
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # before the product, so that fp16 scores stay in range
    # In training the scores leave in the compute dtype and are cast after: asking the GEMM itself for fp32 would make
    # the GEMMs of its backward pass fp32 ones, which a T4 runs without tensor cores. Decoding, which has no backward
    # pass, asks for fp32: pretrained models have scores that fp16 cannot hold (Qwen2).
    # q first goes to the order that the scores want: einsum would leave them transposed, and they are the larger.
    q = q.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=scores_dtype or q.dtype).astype(jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BKGTH", weights, v).transpose(0, 3, 1, 2, 4)


def attend_newest(q: Array, k: Array, v: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Do the same for one new token of each row, and the tokens before it in a cache.

    `q` [B, 1, K, G, H], `k` and `v` [B, 1, K, H] are the new token's, `keys` and `values` [B, K, S, H] the cache's,
    `mask` bool [B or 1, 1, S]. The new token stands beside the cache, not in it: a cache that is both read and
    written in one step is copied for that.
    """
    q = q[:, 0] * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    k, v = k[:, 0, :, None], v[:, 0, :, None]  # [B, K, 1, H]
    # The keys come first in their product: XLA would transpose them, were they second.
    scores = jnp.einsum("BKSH,BKGH->BKSG", keys.astype(q.dtype), q, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores.swapaxes(2, 3), jnp.finfo(jnp.float32).min)  # [B, K, G, S]
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)  # [B, K, G, 1]
    highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own)
    weights, own = jnp.exp(scores - highest), jnp.exp(own - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True) + own
    weights, own = (weights / total).astype(v.dtype), (own / total).astype(v.dtype)
    mixed = jnp.einsum("BKGS,BKSH->BKGH", weights, values.astype(v.dtype)) + own * v
    return mixed[:, None]
