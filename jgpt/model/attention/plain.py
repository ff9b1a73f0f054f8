"""Attention: queries, keys and values in, mixed values out.

In the data path: called by every block (`model/block.py`). The legend of `model/gpt.py` names the dimensions.
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
    """Compute softmax attention with grouped key/value heads, all pairs of a query and a key at once.

    `q` [B, T, K, G, H] (G query heads share each of the K key/value heads), `k` and `v` [B, S, K, H],
    `mask` bool [B or 1, T, S], true where a query may attend to a key. The softmax is in fp32. `drop` is dropout on
    the weights. The scores are products in `scores_dtype`, by default q's. Returns [B, T, K, G, H] in the dtype of `v`.
    """
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # before the product, so that fp16 scores stay in range
    # In training the product returns scores in the compute dtype, which are then cast to fp32. If the product itself
    # returned fp32, the products of its backward pass would be fp32 too, and a T4 runs those without tensor cores.
    # Decoding has no backward pass and asks for fp32: some pretrained models (Qwen2) have scores that fp16 cannot hold.
    # q is transposed to the order of the scores first. Otherwise einsum transposes the scores, which are larger.
    q = q.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("BKGTH,BSKH->BKGTS", q, k, preferred_element_type=scores_dtype or q.dtype).astype(jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BKGTH", weights, v).transpose(0, 3, 1, 2, 4)


def attend_newest(q: Array, k: Array, v: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Compute the attention of each row's newest token to itself and to the tokens in a cache.

    `q` [B, 1, K, G, H], `k` and `v` [B, 1, K, H] are the new token's, `keys` and `values` [B, K, S, H] the cache's.
    `mask` bool [B or 1, 1, S] is true where the cache holds an earlier token of the row. The new token is not in the
    cache yet: XLA copies a cache that is written and read in one step. Returns [B, 1, K, G, H] in the dtype of `v`.
    """
    q = q[:, 0] * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    k, v = k[:, 0, :, None], v[:, 0, :, None]  # [B, K, 1, H]
    # The keys are the first operand: as the second, XLA would transpose them.
    scores = jnp.einsum("BKSH,BKGH->BKSG", keys.astype(q.dtype), q, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, :, None], scores.swapaxes(2, 3), jnp.finfo(jnp.float32).min)  # [B, K, G, S]
    own_score = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)  # [B, K, G, 1]
    row_max = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own_score)
    weights, own_weight = jnp.exp(scores - row_max), jnp.exp(own_score - row_max)
    row_sum = jnp.sum(weights, axis=-1, keepdims=True) + own_weight
    weights, own_weight = (weights / row_sum).astype(v.dtype), (own_weight / row_sum).astype(v.dtype)
    mixed = jnp.einsum("BKGS,BKSH->BKGH", weights, values.astype(v.dtype)) + own_weight * v
    return mixed[:, None]
