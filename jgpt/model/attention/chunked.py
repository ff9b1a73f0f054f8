"""Causal attention in chunks of queries, with a backward pass written by hand that reads the scores few times.

In the data path: a form of `attend_causally` in `choose.py`, for GPUs without a fused kernel. The dimensions are those
of `model/gpt.py`.

On a T4 the products of a head of width 64 take less time than moving their scores through memory. So the cost is how
often an array of [queries, keys] is read or written: 15 times when JAX differentiates attention, 12 times here.

- The weights stay unnormalized, and the output is divided by their sum. Exponentials and sum take one pass.
- The row sums that the softmax's gradient needs come from the output (Dao et al., arXiv 2205.14135, section 3.1), not
  from the weights.
- With `store_weights`, the backward pass gets the weights in the compute dtype, and nothing else of that size. Without
  it, the backward pass computes them again: 15 passes, and no such array is stored.

Each chunk of queries attends to the keys up to its own end. Queries, keys and values are copied once to [positions,
rows x heads, H]: a chunk of positions is then contiguous, and products read it in place. In any other order XLA copies
it for each chunk.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Chunks of queries. With 8, fewer pairs are computed (9/16 of all, not 5/8), but keys are read nearly twice as
# often: slower at T=1024, H=64. Short sequences have fewer: a chunk's own cost is more than the pairs it saves.
CHUNKS, LEAST_QUERIES = 4, 64
# The most that a row of unnormalized weights adds up to. At this size fp16 holds both the weighted sum of values and a
# gradient divided by the row's sum.
LARGEST_ROW_SUM = 32.0


class Residuals(NamedTuple):
    """What the forward pass stores for the backward pass; a list has one entry for each chunk."""

    q: Array  # [T, G, B, K, H], scaled
    kv: Array  # [2, S, B, K, H]
    mask: Array  # bool [B or 1, T, T]
    out: Array  # the output, [B, T, K, G, H]
    row_max: list[Array]  # of the scores, fp32 [B, K, T, G, 1]
    row_sum: list[Array]  # of the unnormalized weights, fp32 [B, K, T, G]
    weights: list[Array]  # unnormalized, [B, K, T, G, S]; empty without `store_weights`


def chunk_size(length: int) -> int:
    """Return the queries of a chunk, of a sequence of `length` tokens; the last chunk may be shorter."""
    return max(-(-length // CHUNKS), min(length, LEAST_QUERIES))


def chunk_bounds(length: int) -> list[tuple[int, int]]:
    """Return the first query of each chunk, and the first one after it.

    >>> chunk_bounds(10), chunk_bounds(300)
    ([(0, 10)], [(0, 75), (75, 150), (150, 225), (225, 300)])
    """
    size = chunk_size(length)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_in_chunks(q: Array, k: Array, v: Array, mask: Array, store_weights: bool) -> Array:
    """Compute causal softmax attention of a sequence to itself (S = T), with a backward pass of our own.

    `q` [B, T, K, G, H], `k` and `v` [B, T, K, H], `mask` bool [B or 1, T, T], true where a query may attend to a key;
    it must be causal. The products are in the dtype of `q`, the softmax in fp32. `store_weights` trades memory for
    time, and changes no value. Returns [B, T, K, G, H] in the dtype of `q`.
    """
    return _forward(q, k, v, mask, store_weights)[0]


def _scores(q: Array, kv: Array, mask: Array, start: int, end: int) -> Array:
    """Return the masked scores of queries start..end-1, fp32 [B, K, queries, G, end]."""
    scores = jnp.einsum("TGBKH,SBKH->BKTGS", q[start:end], kv[0, :end]).astype(jnp.float32)
    return jnp.where(mask[:, None, start:end, None, :end], scores, jnp.finfo(jnp.float32).min)


def _weights(scores: Array, row_max: Array, q: Array) -> Array:
    return (jnp.exp(scores - row_max) * (LARGEST_ROW_SUM / q.shape[0])).astype(q.dtype)


def _forward(q: Array, k: Array, v: Array, mask: Array, store_weights: bool) -> tuple[Array, Residuals]:
    q = (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)).transpose(1, 3, 0, 2, 4)
    # One array behind a barrier: XLA reads slices of it in place. Without the barrier it copies all of k and of v.
    kv = jax.lax.optimization_barrier(jnp.stack([k.transpose(1, 0, 2, 3), v.transpose(1, 0, 2, 3)]))
    mixed, row_max, row_sum, weights = [], [], [], []
    for start, end in chunk_bounds(q.shape[0]):
        scores = _scores(q, kv, mask, start, end)
        row_max.append(jnp.max(scores, axis=-1, keepdims=True))
        weights.append(_weights(scores, row_max[-1], q))
        row_sum.append(jnp.sum(weights[-1].astype(jnp.float32), axis=-1))
        mixed.append(jnp.einsum("BKTGS,SBKH->BKTGH", weights[-1], kv[1, :end]))
    normalized = jnp.concatenate(mixed, axis=2).astype(jnp.float32) / jnp.concatenate(row_sum, axis=2)[..., None]
    out = normalized.astype(q.dtype).transpose(0, 2, 1, 3, 4)
    return out, Residuals(q, kv, mask, out, row_max, row_sum, weights if store_weights else [])


def _backward(store_weights: bool, saved: Residuals, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, kv, width = saved.q, saved.kv, d_out.shape[-1]
    if not store_weights:  # else XLA sees that the forward pass computed the same weights, and stores those
        q, kv, d_out = jax.lax.optimization_barrier((q, kv, d_out))
    chunks = chunk_bounds(q.shape[0])
    d_mixed = d_out.transpose(1, 3, 0, 2, 4)  # [T, G, B, K, H]
    # Multiplied as [rows, H]: otherwise XLA transposes the products to the order in which it wants to sum them.
    products = d_out.reshape(-1, width).astype(jnp.float32) * saved.out.reshape(-1, width).astype(jnp.float32)
    sums = jnp.sum(products, axis=-1).reshape(d_out.shape[:-1]).transpose(0, 2, 1, 3)  # [B, K, T, G]
    d_q, d_k, d_v = [], [[] for _ in chunks], [[] for _ in chunks]
    for i, (start, end) in enumerate(chunks):
        row_sum, d_rows = saved.row_sum[i], d_mixed[start:end]
        if store_weights:
            weights = saved.weights[i]
        else:
            weights = _weights(_scores(q, kv, saved.mask, start, end), saved.row_max[i], q)
        d_weights = jnp.einsum("TGBKH,SBKH->BKTGS", d_rows, kv[1, :end]).astype(jnp.float32)
        d_scores = weights.astype(jnp.float32) * (d_weights - sums[:, :, start:end, :, None]) / row_sum[..., None]
        d_scores = d_scores.astype(q.dtype)
        d_rows = (d_rows.astype(jnp.float32) / row_sum.transpose(2, 3, 0, 1)[..., None]).astype(q.dtype)
        d_q.append(jnp.einsum("BKTGS,SBKH->BKTGH", d_scores, kv[0, :end]))
        d_keys = jnp.einsum("BKTGS,TGBKH->SBKH", d_scores, q[start:end])
        d_values = jnp.einsum("BKTGS,TGBKH->SBKH", weights, d_rows)
        for j, (first, last) in enumerate(chunks[: i + 1]):
            d_k[j].append(d_keys[first:last])
            d_v[j].append(d_values[first:last])
    d_q = jnp.concatenate(d_q, axis=2) * jnp.asarray(width**-0.5, q.dtype)
    return d_q.transpose(0, 2, 1, 3, 4), _joined(d_k), _joined(d_v), None


def _joined(parts: list[list[Array]]) -> Array:
    """Add up, in fp32, what each chunk of keys gets from the chunks of queries: [S, B, K, H] parts to [B, S, K, H]."""
    summed = [sum(part.astype(jnp.float32) for part in parts_of_chunk) for parts_of_chunk in parts]
    return jnp.concatenate(summed).astype(parts[0][0].dtype).transpose(1, 0, 2, 3)


attend_in_chunks.defvjp(_forward, _backward)
