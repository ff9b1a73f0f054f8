"""The forms of causal attention: choose one for a device, and call the one chosen.

In the data path: called by every block (`model/block.py`). The legend of `model/gpt.py` names the dimensions.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgpt.errors import UserError
from jgpt.model.attention import flash, flash_tpu
from jgpt.model.attention.chunked import attend_in_chunks, chunk_bounds
from jgpt.model.attention.plain import attend

log = logging.getLogger("jgpt")

Attend = Callable[[Array, Array, Array, Array | None], Array]  # (q, k, v, segments) -> the output
Split = Callable[[Attend], Attend]  # makes it run on each device, on the sequences and heads that are there


def choose_attention(
    attention: str,
    compute: Any,
    platform: str,
    compute_capability: tuple[int, int] | None,
    d_head: int = 64,
    deterministic: bool = False,
) -> str:
    """Return the form of `attend_causally` that `execution.attention` means on a device.

    `compute` is the dtype of the matrix products; `platform` is "cpu", "gpu" or "tpu"; `compute_capability` is (7, 5)
    for a T4, None where there is none; `d_head` is the width of a head.

    - "flash" is the fused kernel of the device: ours in fp16 from sm_75 on, else "cudnn" from sm_80 on, where results
      need not be `deterministic`; on a TPU "flash_tpu". Raises UserError where there is none.
    - "auto" is a fused kernel on the devices where one has been measured to be the fastest (docs/benchmarks: from sm_80
      on), or is predicted to be (docs/planning.md: on a TPU, with heads that fill its matrix unit), else "chunked_vjp".

    >>> choose_attention("auto", jnp.float16, "gpu", (7, 5)), choose_attention("auto", jnp.float32, "cpu", None)
    ('chunked_vjp', 'chunked_vjp')
    """
    major, minor = compute_capability or (0, 0)
    capability = (major, minor)
    if attention not in ("auto", "flash"):
        return attention
    if attention == "auto" and not (flash_tpu.fills_unit(d_head) if platform == "tpu" else capability >= (8, 0)):
        return "chunked_vjp"
    ours = capability >= (7, 5) and flash.supports(d_head, compute)
    cudnn = capability >= (8, 0) and compute != jnp.float32 and d_head % 8 == 0 and d_head <= 128
    if platform == "tpu":
        fused = "flash_tpu" if flash_tpu.supports(d_head, compute) else ""
    elif ours and _can_launch():
        fused = "flash"
    else:
        fused = "cudnn" if cudnn and not deterministic else ""
    if fused or attention == "auto":
        return fused or "chunked_vjp"
    device = "sm_{}{}".format(*compute_capability) if compute_capability else platform
    given = f"execution.attention='flash' on {device} in {jnp.dtype(compute).name} with heads {d_head} wide: "
    if ours:
        raise UserError(
            f"{given}our kernels cannot be launched ({_launch_problem()}). Allowed: jaxlib 0.7.2 to 0.12, with JAX's"
            " CUDA plugin. Take --config.execution.attention=auto."
        )
    exact = " with execution.deterministic=False" if deterministic else ""
    raise UserError(
        f"{given}there is no fused attention for this. Allowed: fp16 and heads 32, 64, 96 or 128 wide on a GPU of"
        " compute capability 7.5 (a T4) or more; fp16 or bf16 and heads of 8, 16, ... 128 from 8.0 on"
        f"{exact}; bf16 or fp32 and heads up to 128 wide, or of a multiple of 128, on a TPU. Take"
        " --config.execution.attention=auto."
    )


@cache
def _launch_problem() -> str:
    """Return why this jaxlib cannot launch our kernels; "" where it can."""
    try:
        flash.check()
    except flash.FlashUnavailable as error:
        return str(error)
    return ""


@cache
def _can_launch() -> bool:
    """Tell whether this jaxlib can launch our kernels; say once why not."""
    if problem := _launch_problem():
        log.warning("our attention kernels are not used: %s", problem)
    return not problem


def attend_causally(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    attention: str = "chunked",
    drop: Callable[[Array], Array] | None = None,
    scores_dtype: Any = None,
    segments: Array | None = None,
    split: Split | None = None,
) -> Array:
    """Compute causal softmax attention of a sequence to itself (S = T), in the form that `attention` names.

    `q` [B, T, K, G, H], `k` and `v` [B, T, K, H], `mask` bool [B or 1, T, T], true where a query may attend to a key;
    it must be causal, and exclude other segments where `segments` int32 [B, T] are given. `drop` is dropout on the
    weights. The scores are products in `scores_dtype`, by default q's. `split` runs "flash" on several devices, which
    XLA does by itself for the others but "flash_tpu". Returns [B, T, K, G, H] in the dtype of `v`. The forms agree to
    rounding:

    - "plain": all pairs of a query and a key at once.
    - "chunked": the queries in four chunks, each with the keys up to its end: 5/8 of the work and of the memory.
    - "chunked_vjp", "chunked_vjp_recompute": the same chunks, with a backward pass of our own (`chunked.py`).
    - "flash": our fused kernels, fp16 only (`flash/`).
    - "flash_tpu": JAX's fused kernel for TPUs (`flash_tpu.py`), bf16 and fp32.
    - "cudnn": cuDNN's fused kernel, fp16 and bf16.

    Only "plain" and "chunked" support `drop` and `scores_dtype`; with these, the other forms compute as "chunked".
    "cudnn" supports no mask but the causal one: where texts share a row, it computes as "chunked_vjp".
    """
    supports_vjp = drop is None and scores_dtype is None
    if attention == "flash" and supports_vjp:
        return (split(flash.flash) if split else flash.flash)(q, k, v, segments)
    if attention == "flash_tpu" and supports_vjp:
        return flash_tpu.flash_on_tpu(q, k, v, segments)
    if attention == "cudnn" and supports_vjp and mask.shape[0] == 1:
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])  # [B, T, N, H]: G neighbouring query heads share a key head
        return jax.nn.dot_product_attention(heads, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)
    if attention in ("chunked_vjp", "chunked_vjp_recompute", "cudnn") and supports_vjp:
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
