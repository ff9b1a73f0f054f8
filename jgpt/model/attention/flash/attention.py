"""Causal attention by kernels of our own, which run on GPUs from compute capability 7.5 (a T4) on.

In the data path: a form of `attend_causally` in `choose.py`. No array of [queries, keys] is ever in memory:
besides the output, an fp32 number for each query and head is kept for the backward pass. The gradients are the same
bits every time.

All in fp16 with fp32 sums and softmax. The scores are scaled in fp32, after the product. The dimensions are those of
`model/gpt.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .launch import device_capability, launch
from .shapes import WIDTHS


def supports(width: int, dtype: Any) -> bool:
    """Say whether there are kernels for heads of this width and dtype."""
    return width in WIDTHS and jnp.dtype(dtype) == jnp.float16


def flash(q: Array, k: Array, v: Array, segments: Array | None = None, capability: int | None = None) -> Array:
    """Compute causal softmax attention of a sequence to itself (S = T).

    `q` [B, T, K, G, H], `k` and `v` [B, T, K, H], all fp16. `segments` int32 [B, T]: a query sees only keys of its own
    segment. `capability` is that of the GPU, 75 for a T4; by default that of the first GPU here. Returns
    [B, T, K, G, H]. Raises launch.FlashUnavailable where this jaxlib cannot launch kernels.
    """
    _check(q, segments)
    shapes = q.shape, k.shape, v.shape
    assert k.dtype == v.dtype == q.dtype and k.shape == v.shape == (*q.shape[:3], q.shape[4]), shapes
    return _attend((q, k, v), segments, device_capability() if capability is None else capability)


def flash_qkv(qkv: Array, segments: Array | None = None, capability: int | None = None) -> Array:
    """Compute causal softmax attention of one array of queries, keys and values; its gradient is one array as well.

    `qkv` [B, T, K, G + 2, H]: for each key/value head its G query heads, then its key, then its value.
    """
    _check(qkv, segments)
    return _attend((qkv,), segments, device_capability() if capability is None else capability)


def _check(x: Array, segments: Array | None) -> None:
    assert x.ndim == 5 and supports(x.shape[-1], x.dtype), f"no kernel for {x.dtype} of shape {x.shape}"
    assert segments is None or (segments.dtype == jnp.int32 and segments.shape == x.shape[:2]), segments


def _dims(inputs: tuple[Array, ...]) -> tuple[int, int, int, int, int]:
    batch, length, groups, members, width = inputs[0].shape
    return batch, length, groups, members - 2 if len(inputs) == 1 else members, width


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(inputs: tuple[Array, ...], segments: Array | None, capability: int) -> Array:
    return _forward(inputs, segments, capability)[0]


def _forward(inputs: tuple[Array, ...], segments: Array | None, capability: int) -> tuple[Array, Any]:
    dims = batch, length, groups, members, width = _dims(inputs)
    fused = len(inputs) == 1
    operands = inputs * 3 if fused else inputs
    results = [
        jax.ShapeDtypeStruct((batch, length, groups, members, width), jnp.float16),
        jax.ShapeDtypeStruct((batch, groups * members, length), jnp.float32),  # log2 of the sums of exponentials
    ]
    where = inputs[0] if segments is None else segments
    out, log_sums = launch("forward", (*operands, where), results, dims, fused, segments is not None, capability)
    return out, (inputs, segments, out, log_sums)


def _backward(capability: int, kept: Any, d_out: Array) -> tuple[tuple[Array, ...], None]:
    inputs, segments, out, log_sums = kept
    dims, fused, packed = _dims(inputs), len(inputs) == 1, segments is not None
    q, k, v = inputs * 3 if fused else inputs
    where = inputs[0] if segments is None else segments
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, log_sums)]
    operands = (q, k, v, out, d_out, log_sums, where)
    d_q, dots = launch("backward_q", operands, like, dims, fused, packed, capability)
    operands = (q, k, v, d_out, log_sums, dots, where)
    if fused:  # the second kernel writes its part into the array that the first one wrote
        whole = [jax.ShapeDtypeStruct(d_q.shape, d_q.dtype)]
        d_qkv = launch("backward_kv", (*operands, d_q), whole, dims, fused, packed, capability, {len(operands): 0})
        return (d_qkv[0],), None
    like = [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2
    d_k, d_v = launch("backward_kv", operands, like, dims, fused, packed, capability)
    return (d_q, d_k, d_v), None


_attend.defvjp(_forward, _backward)
