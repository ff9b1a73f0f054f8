"""Compute the summed cross-entropy of hidden states and targets, without all logits in memory at once.

In the data path: the end of the forward pass in training and evaluation.

The logits of a batch are its largest array: 8 x 1024 x 50304 in fp32 is 1.65 GB, and their gradient takes the same
again. Here one chunk of tokens at a time computes its logits, its loss and, from the same logits, both gradients. No
logits are stored for the backward pass, and nothing is computed twice. The idea is from the fused cross-entropies of
Liger (arXiv 2410.10989) and Apple (arXiv 2411.09009).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jgpt.model.layers import product_of_transposed

SCALE = 1024.0  # of the logits' gradients while they are in the compute dtype: fp16 then holds the small ones too


@jax.named_scope("loss")  # one of model/scopes.py
def cross_entropy(hidden: Array, unembedding: Array, targets: Array, weights: Array, chunk_tokens: int = 0) -> Array:
    """Return the sum of weights * -log softmax(hidden @ unembedding.T)[targets] over all tokens, an fp32 scalar.

    `hidden` [B, T, D] and `unembedding` [V, D] are multiplied in the dtype of the unembedding. `targets` int [B, T],
    `weights` fp32 [B, T]. At most [chunk_tokens, V] logits are in memory at a time; with 0, all of them are. The
    gradient is that of the plain formula, to rounding.
    """
    tokens = targets.size
    hidden, targets, weights = hidden.reshape(tokens, -1), targets.reshape(tokens), weights.reshape(tokens)
    chunks = -(-tokens // chunk_tokens) if chunk_tokens else 1
    padding = -tokens % chunks
    if padding:  # tokens of weight zero fill the last chunk
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
        targets, weights = jnp.pad(targets, (0, padding)), jnp.pad(weights, (0, padding))
    hidden = hidden.reshape(chunks, -1, hidden.shape[-1])
    return _summed(hidden, unembedding, targets.reshape(chunks, -1), weights.reshape(chunks, -1))


@jax.custom_vjp
def _summed(hidden: Array, unembedding: Array, targets: Array, weights: Array) -> Array:
    def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, weights = chunk
        losses, _ = _losses(hidden, unembedding, targets, jnp.float32)
        return total + jnp.sum(losses * weights), None

    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), (hidden, targets, weights))[0]


def _losses(hidden: Array, unembedding: Array, targets: Array, dtype: Any) -> tuple[Array, Array]:
    """Return the losses [n] and the probabilities [n, V] of a chunk, fp32; the product's logits are in `dtype`."""
    logits = jnp.einsum("nD,VD->nV", hidden.astype(unembedding.dtype), unembedding, preferred_element_type=dtype)
    logits = logits.astype(jnp.float32)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - highest)
    z = jnp.sum(exponentials, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (jnp.log(z) + highest - target_logits)[:, 0], exponentials / z


def _summed_forward(hidden: Array, unembedding: Array, targets: Array, weights: Array) -> tuple[Array, tuple]:
    peak = jnp.max(jnp.abs(weights))  # large where few targets of a chat batch count, as its weights have mean 1
    scale = SCALE / jnp.where(peak > 0, peak, 1)
    # In training the logits are read three times, and fp16 halves the time of that. bf16 would round them too coarsely.
    dtype = jnp.float16 if unembedding.dtype == jnp.float16 else jnp.float32

    def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], tuple]:
        total, d_unembedding = carry
        hidden, targets, weights = chunk
        losses, probabilities = _losses(hidden, unembedding, targets, dtype)
        d_logits = probabilities - jax.nn.one_hot(targets, unembedding.shape[0], dtype=jnp.float32)
        # Scaled to at most SCALE, so that fp16 holds the small ones too. The backward pass divides by the scale.
        d_logits = (d_logits * (weights * scale)[:, None]).astype(unembedding.dtype)
        d_hidden = jnp.einsum("nV,VD->nD", d_logits, unembedding, preferred_element_type=jnp.float32)
        d_unembedding += product_of_transposed(d_logits, hidden.astype(unembedding.dtype), jnp.float32)
        return (total + jnp.sum(losses * weights), d_unembedding), (d_hidden, losses)

    start = jnp.zeros((), jnp.float32), jnp.zeros(unembedding.shape, jnp.float32)
    (total, d_unembedding), (d_hidden, losses) = jax.lax.scan(add_chunk, start, (hidden, targets, weights))
    # Of hidden and unembedding the backward pass needs only the dtypes, so it gets empty arrays.
    return total, (d_hidden, d_unembedding, losses, peak, hidden[:0], unembedding[:0])


def _summed_backward(residuals: tuple, cotangent: Array) -> tuple[Array, Array, None, Array]:
    d_hidden, d_unembedding, losses, peak, hidden, unembedding = residuals
    scale = cotangent * peak / SCALE
    return (
        (d_hidden * scale).astype(hidden.dtype),
        (d_unembedding * scale).astype(unembedding.dtype),
        None,
        losses * cotangent,
    )


_summed.defvjp(_summed_forward, _summed_backward)
