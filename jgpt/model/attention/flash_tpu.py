"""Fused causal attention on a TPU: the Pallas kernel that comes with JAX.

In the data path: a form of `attend_causally` in `choose.py`. The dimensions are those of `model/gpt.py`.

The kernel (jax.experimental.pallas.ops.tpu.flash_attention) stores no array of [queries, keys], forward or backward.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

LANES = 128  # the matrix unit's side: the kernel's blocks are multiples of it
BLOCKS = (512, 256, 128)  # queries and keys at a time; small ones leave the matrix unit idle between them


def supports(d_head: int, compute: Any) -> bool:
    """Tell whether the kernel takes heads of such a width, and products in such a dtype."""
    return (d_head <= LANES or d_head % LANES == 0) and compute in (jnp.bfloat16, jnp.float32)


def fills_unit(d_head: int) -> bool:
    """Tell whether no padding is multiplied for heads of such a width."""
    return d_head % LANES == 0


def block_size(length: int) -> int:
    """Return how many queries, and keys, the kernel takes at a time from a row of `length` tokens, a multiple of 128.

    >>> block_size(1024), block_size(384)
    (512, 128)
    """
    return next(size for size in BLOCKS if length % size == 0)


def flash_on_tpu(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
    """Compute causal softmax attention of a sequence to itself (S = T); tokens see those of their own segment.

    `q` [B, T, K, G, H], `k` and `v` [B, T, K, H] in one dtype, `segments` int32 [B, T]. Returns [B, T, K, G, H].
    """
    # Here: Pallas is loaded where there is a TPU, and nowhere else.
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    batch, length, keys, group, width = q.shape
    more = -length % LANES  # tokens behind the last one: none before them sees them

    def heads_first(x: Array) -> Array:
        padded = jnp.pad(x.reshape(batch, length, -1, width), ((0, 0), (0, more), (0, 0), (0, 0)))
        return padded.transpose(0, 2, 1, 3)  # [B, N, T, H]

    # The kernel wants a key for each query head; the gradients of the copies are added up where they are made.
    k, v = (jnp.broadcast_to(x[:, :, :, None], q.shape) for x in (k, v))
    ids = None if segments is None else jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1)
    size = block_size(length + more)
    out = flash_attention(
        *map(heads_first, (q, k, v)),
        segment_ids=None if ids is None else SegmentIds(ids, ids),
        causal=True,
        sm_scale=width**-0.5,
        block_sizes=BlockSizes(
            block_q=size, block_k_major=size, block_k=size, block_b=1,
            block_q_major_dkv=size, block_k_major_dkv=size, block_k_dkv=size, block_q_dkv=size,
            block_k_major_dq=size, block_k_dq=size, block_q_dq=size,
        ),
    )  # fmt: skip
    return out[:, :, :length].transpose(0, 2, 1, 3).reshape(batch, length, keys, group, width)
