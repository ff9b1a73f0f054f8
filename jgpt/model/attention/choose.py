"""The forms of causal attention: choose one for a device, and call the one chosen.

In the data path: called by every block of `model/gpt.py`, whose legend names the dimensions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgpt.errors import UserError
from jgpt.model.attention.chunked import attend_in_chunks, chunk_bounds
from jgpt.model.attention.plain import attend


def choose_attention(
    attention: str,
    compute: Any,
    platform: str,
    compute_capability: tuple[int, int] | None,
    d_head: int = 64,
    deterministic: bool = False,
) -> str:
    """Return the form that `execution.attention` means on a device.

    `compute` is the dtype of the matrix products; `platform` is "cpu", "gpu" or "tpu"; `compute_capability` is (7, 5)
    for a T4, None where there is none; `d_head` is the width of a head. "auto" is "chunked" on a CPU, where arithmetic
    is the cost. On a GPU, where memory traffic is, it is "flash" if cuDNN has the kernel (on an H100 the fastest, see
    docs/benchmarks) and results need not be `deterministic`, else "chunked_vjp". cuDNN takes sm_80 and above, fp16 and
    bf16, and heads of 8, 16, ... 128. Raises UserError for "flash" where there is none.

    >>> choose_attention("auto", jnp.float16, "gpu", (7, 5))
    'chunked_vjp'
    """
    has_cudnn = (compute_capability or (0, 0)) >= (8, 0) and compute != jnp.float32
    has_cudnn = has_cudnn and d_head % 8 == 0 and d_head <= 128
    if attention == "auto":
        return "flash" if has_cudnn and not deterministic else "chunked_vjp" if platform == "gpu" else "chunked"
    if attention == "flash" and has_cudnn and deterministic:
        raise UserError(
            "execution.attention='flash' with execution.deterministic=True: cuDNN's fused attention is not the same bit"
            " for bit after a restart. Allowed: one of them. Take --config.execution.deterministic=false, or"
            " --config.execution.attention=auto."
        )
    if attention == "flash" and not has_cudnn:
        device = "sm_{}{}".format(*compute_capability) if compute_capability else platform
        raise UserError(
            f"attention='flash' on {device} in {jnp.dtype(compute).name} with heads {d_head} wide: cuDNN's fused"
            " attention needs a GPU of compute capability 8.0 or above (a T4 is 7.5), fp16 or bf16, and heads of a"
            " width that 8 divides, at most 128. Allowed here: 'auto', 'plain',"
            " 'chunked', 'chunked_vjp', 'chunked_vjp_recompute'. Take --config.execution.attention=auto."
        )
    return attention


def attend_causally(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    attention: str = "chunked",
    drop: Callable[[Array], Array] | None = None,
    scores_dtype: Any = None,
) -> Array:
    """Compute causal softmax attention of a sequence to itself (S = T), in the form that `attention` names.

    `q` [B, T, K, G, H], `k` and `v` [B, T, K, H], `mask` bool [B or 1, T, T], true where a query may attend to a key;
    it must be causal. `drop` is dropout on the weights. The scores are products in `scores_dtype`, by default q's.
    Returns [B, T, K, G, H] in the dtype of `v`. The forms agree to rounding:

    - "plain": all pairs of a query and a key at once.
    - "chunked": the queries in four chunks, each with the keys up to its end: 5/8 of the work and of the memory.
    - "chunked_vjp", "chunked_vjp_recompute": the same chunks, with a backward pass of our own (`chunked.py`).
    - "flash": cuDNN's fused kernel.

    Only "plain" and "chunked" support `drop` and `scores_dtype`; with these, the other forms compute as "chunked".
    "flash" supports no mask but the causal one: where texts share a row, it computes as "chunked_vjp".
    """
    supports_vjp = drop is None and scores_dtype is None
    if attention == "flash" and supports_vjp and mask.shape[0] == 1:
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, T, N, H]: G neighbouring query heads share a key head
        return jax.nn.dot_product_attention(heads, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)
    if attention in ("chunked_vjp", "chunked_vjp_recompute", "flash") and supports_vjp:
        store_weights = attention != "chunked_vjp_recompute"
        return attend_in_chunks(q, k, v, mask, store_weights)
    drop = drop or (lambda weights: weights)
    if attention == "plain":
        return attend(q, k, v, mask, drop, scores_dtype)
    chunks = [
        attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end], drop, scores_dtype)
        for start, end in chunk_bounds(q.shape[1])
    ]
    return jnp.concatenate(chunks, axis=1)
