"""The forms of causal attention: which one a device takes, and the call of each.

In the data path: called by every block of `model/gpt.py`, whose legend names the dimensions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgpt.errors import UserError
from jgpt.model.attention.chunked import CHUNKS, attend_in_chunks
from jgpt.model.attention.plain import attend


def choose_attention(
    attention: str, compute: Any, platform: str, compute_capability: tuple[int, int] | None, d_head: int = 64
) -> str:
    """Resolve the config's `attention` for a device, given as to `choose_policy`; `compute` is the products' dtype.

    "auto" is "flash" where cuDNN has the kernel (2.4 times as fast on an H100, docs/benchmarks), else "chunked_vjp" on
    GPUs, whose cost is memory traffic, and "chunked" on CPUs, whose cost is arithmetic. cuDNN takes sm_80 and above,
    fp16 and bf16, and heads of 8, 16, ... 128. Raises UserError for "flash" where there is none.

    >>> choose_attention("auto", jnp.float16, "gpu", (7, 5))
    'chunked_vjp'
    """
    has_cudnn = (compute_capability or (0, 0)) >= (8, 0) and compute != jnp.float32
    has_cudnn = has_cudnn and d_head % 8 == 0 and d_head <= 128
    if attention == "auto":
        return "flash" if has_cudnn else "chunked_vjp" if platform == "gpu" else "chunked"
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
    """Softmax attention of a sequence to itself (S = T), where no query looks past its own place.

    Shapes are those of `attend` in `plain.py`. `attention` names the form; all agree to rounding:

    - "plain": all pairs at once.
    - "chunked": the queries go in four pieces, each with the keys up to its end only: 5/8 of the work and the memory.
    - "chunked_vjp", "chunked_vjp_recompute": the same pieces, with a backward pass of our own (`chunked.py`).
    - "flash": a fused kernel, which knows no mask but the causal one.

    Dropout, a `scores_dtype` and texts that share a row are computed as "chunked" where a form does not support them.
    """
    alone = drop is None and scores_dtype is None
    if attention == "flash" and alone and mask.shape[0] == 1:
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, T, N, H]; G query heads in a row share a key
        return jax.nn.dot_product_attention(heads, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)
    if attention in ("chunked_vjp", "chunked_vjp_recompute", "flash") and alone:
        return attend_in_chunks(q, k, v, mask, attention != "chunked_vjp_recompute")
    drop = drop or (lambda weights: weights)
    if attention == "plain":
        return attend(q, k, v, mask, drop, scores_dtype)
    length = q.shape[1]
    size = -(-length // CHUNKS)
    pieces = []
    for start in range(0, length, size):
        end = min(start + size, length)
        pieces.append(attend(q[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end], drop, scores_dtype))
    return jnp.concatenate(pieces, axis=1)
