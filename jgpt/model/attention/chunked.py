"""Causal attention whose backward pass is written by hand: few passes over the scores, which are what it costs.

In the data path: a form of `attend_causally` in `model/attention.py`, for GPUs without a fused kernel. The dimensions
are those of `model/gpt.py`.

On a T4 the products of a head 64 wide take less time than their scores take to move through memory, so what counts is
how often an array of [queries, keys] is read or written. Differentiated by JAX, attention does so 15 times, here 12:

- The weights stay unnormalized and what they mix is divided instead: exponentials and their sum are one pass.
- The gradient's row sums come from the output (Dao et al., arXiv 2205.14135, section 3.1), not from the weights.
- With `keep`, the weights in the compute dtype are all that is kept for the backward pass; without, they are made once
  more there: 15 passes, and no memory of that size.

The queries go in chunks, each with the keys up to its end only. Queries, keys and values are copied once to [positions,
rows x heads, H]: a run of positions is then a piece of memory that products read where it lies, where XLA would
otherwise copy it for each chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CHUNKS = 4  # 8 leave fewer pairs that nobody sees, and read the keys more often: at T=1024, H=64 slower
LARGEST_SUM = 32.0  # of a row of unnormalized weights: fp16 holds both what they mix and a gradient divided by it


class _Kept(NamedTuple):
    """What the backward pass needs; the lists have an entry for each chunk."""

    q: Array  # [T, G, B, K, H], scaled
    kv: Array  # [2, S, B, K, H]
    mask: Array
    mixed: Array  # the output, [B, T, K, G, H]
    highest: list[Array]  # score of a row, fp32 [B, K, T, G, 1]
    total: list[Array]  # of a row's weights, fp32 [B, K, T, G]
    weights: list[Array]  # unnormalized [B, K, T, G, S]; empty: to be made again


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_chunks(q: Array, k: Array, v: Array, mask: Array, keep: bool) -> Array:
    """Softmax attention of a sequence to itself, where no query looks past its own place.

    `q` [B, T, K, G, H], `k` and `v` [B, T, K, H], `mask` bool [B or 1, T, T], true where a query may look. The products
    are in the dtype of q, the softmax in fp32. `keep` trades memory for time, and changes no value. Returns
    [B, T, K, G, H].
    """
    return _forward(q, k, v, mask, keep)[0]


def _chunks(length: int) -> list[tuple[int, int]]:
    size = -(-length // CHUNKS)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(kept_q: Array, kv: Array, mask: Array, start: int, end: int) -> Array:
    scores = jnp.einsum("TGBKH,SBKH->BKTGS", kept_q[start:end], kv[0, :end]).astype(jnp.float32)
    return jnp.where(mask[:, None, start:end, None, :end], scores, jnp.finfo(jnp.float32).min)


def _weights(scores: Array, highest: Array, q: Array) -> Array:
    return (jnp.exp(scores - highest) * (LARGEST_SUM / q.shape[0])).astype(q.dtype)


def _forward(q: Array, k: Array, v: Array, mask: Array, keep: bool) -> tuple[Array, _Kept]:
    q = (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)).transpose(1, 3, 0, 2, 4)
    # One array behind a barrier: XLA reads slices of it in place, and would copy a whole k or v to another order.
    kv = jax.lax.optimization_barrier(jnp.stack([k.transpose(1, 0, 2, 3), v.transpose(1, 0, 2, 3)]))
    mixed, highest, total, weights = [], [], [], []
    for start, end in _chunks(q.shape[0]):
        scores = _scores(q, kv, mask, start, end)
        highest.append(jnp.max(scores, axis=-1, keepdims=True))
        weights.append(_weights(scores, highest[-1], q))
        total.append(jnp.sum(weights[-1].astype(jnp.float32), axis=-1))
        mixed.append(jnp.einsum("BKTGS,SBKH->BKTGH", weights[-1], kv[1, :end]))
    divided = jnp.concatenate(mixed, axis=2).astype(jnp.float32) / jnp.concatenate(total, axis=2)[..., None]
    out = divided.astype(q.dtype).transpose(0, 2, 1, 3, 4)
    return out, _Kept(q, kv, mask, out, highest, total, weights if keep else [])


def _backward(keep: bool, kept: _Kept, cotangent: Array) -> tuple[Array, Array, Array, None]:
    q, kv, width = kept.q, kept.kv, cotangent.shape[-1]
    if not keep:  # else XLA finds that it has had these weights before, and keeps them
        q, kv, cotangent = jax.lax.optimization_barrier((q, kv, cotangent))
    chunks = _chunks(q.shape[0])
    d_mixed = cotangent.transpose(1, 3, 0, 2, 4)  # [T, G, B, K, H]
    # Flat, or XLA transposes the products for a sum that it wants in another order.
    products = cotangent.reshape(-1, width).astype(jnp.float32) * kept.mixed.reshape(-1, width).astype(jnp.float32)
    sums = jnp.sum(products, axis=-1).reshape(cotangent.shape[:-1]).transpose(0, 2, 1, 3)  # [B, K, T, G]
    d_q, d_k, d_v = [], [[] for _ in chunks], [[] for _ in chunks]
    for i, (start, end) in enumerate(chunks):
        total, out = kept.total[i], d_mixed[start:end]
        if keep:
            weights = kept.weights[i]
        else:
            weights = _weights(_scores(q, kv, kept.mask, start, end), kept.highest[i], q)
        d_weights = jnp.einsum("TGBKH,SBKH->BKTGS", out, kv[1, :end]).astype(jnp.float32)
        d_scores = weights.astype(jnp.float32) * (d_weights - sums[:, :, start:end, :, None]) / total[..., None]
        d_scores = d_scores.astype(q.dtype)
        out = (out.astype(jnp.float32) / total.transpose(2, 3, 0, 1)[..., None]).astype(q.dtype)
        d_q.append(jnp.einsum("BKTGS,SBKH->BKTGH", d_scores, kv[0, :end]))
        of_k = jnp.einsum("BKTGS,TGBKH->SBKH", d_scores, q[start:end])
        of_v = jnp.einsum("BKTGS,TGBKH->SBKH", weights, out)
        for j, (first, last) in enumerate(chunks[: i + 1]):
            d_k[j].append(of_k[first:last])
            d_v[j].append(of_v[first:last])
    d_q = jnp.concatenate(d_q, axis=2) * jnp.asarray(width**-0.5, q.dtype)
    return d_q.transpose(0, 2, 1, 3, 4), _joined(d_k), _joined(d_v), None


def _joined(parts: list[list[Array]]) -> Array:
    """Add what each chunk of keys got from the chunks of queries, in fp32; [S, B, K, H] parts to [B, S, K, H]."""
    added = [sum(part.astype(jnp.float32) for part in of_chunk) for of_chunk in parts]
    return jnp.concatenate(added).astype(parts[0][0].dtype).transpose(1, 0, 2, 3)


attend_in_chunks.defvjp(_forward, _backward)
