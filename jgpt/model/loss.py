"""The loss: hidden states and targets in, summed cross-entropy out, without all logits in memory at once.

In the data path: the end of the forward pass in training and evaluation.

The logits of a batch are its largest array (8 x 1024 x 50304 in fp32 is 1.65 GB, and as much again for their
gradient). Here a chunk of tokens at a time makes its logits, its loss and, while they are there, both gradients:
nothing of size V is kept, and nothing is computed twice. The idea is that of Liger's and Apple's fused cross-entropies
(arXiv 2410.10989, 2411.09009).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SCALE = 1024.0


@jax.named_scope("loss")  # one of model/scopes.py
def cross_entropy(hidden: Array, unembedding: Array, targets: Array, weights: Array, chunk_tokens: int = 0) -> Array:
    """Sum weights * -log softmax(hidden @ unembedding.T)[targets] over all tokens, in fp32.

    `hidden` [B, T, D] and `unembedding` [V, D] are multiplied in the unembedding's dtype; `targets` int [B, T];
    `weights` fp32 [B, T]. `chunk_tokens` bounds the logits in memory to [chunk_tokens, V]; 0 makes one chunk.
    The gradient is that of the plain formula (to rounding).
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
    """Return the losses [n] and the probabilities [n, V] of a chunk, fp32; its product gives logits in `dtype`."""
    logits = jnp.einsum("nD,VD->nV", hidden.astype(unembedding.dtype), unembedding, preferred_element_type=dtype)
    logits = logits.astype(jnp.float32)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - highest)
    z = jnp.sum(exponentials, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (jnp.log(z) + highest - picked)[:, 0], exponentials / z


def _summed_forward(hidden: Array, unembedding: Array, targets: Array, weights: Array) -> tuple[Array, tuple]:
    peak = jnp.max(jnp.abs(weights))  # where few targets count, theirs are large
    scale = SCALE / jnp.where(peak > 0, peak, 1)
    # In training the logits are read three times: fp16 ones take half as long. bf16 would round them too coarsely.
    dtype = jnp.float16 if unembedding.dtype == jnp.float16 else jnp.float32

    def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], tuple]:
        total, d_unembedding = carry
        hidden, targets, weights = chunk
        losses, probabilities = _losses(hidden, unembedding, targets, dtype)
        d_logits = probabilities - jax.nn.one_hot(targets, unembedding.shape[0], dtype=jnp.float32)
        # At most SCALE in size: fp16 holds it, and with it the small ones. Undone in the backward pass.
        d_logits = (d_logits * (weights * scale)[:, None]).astype(unembedding.dtype)
        d_hidden = jnp.einsum("nV,VD->nD", d_logits, unembedding, preferred_element_type=jnp.float32)
        d_unembedding += jnp.einsum(
            "nV,nD->VD", d_logits, hidden.astype(unembedding.dtype), preferred_element_type=jnp.float32
        )
        return (total + jnp.sum(losses * weights), d_unembedding), (d_hidden, losses)

    start = jnp.zeros((), jnp.float32), jnp.zeros(unembedding.shape, jnp.float32)
    (total, d_unembedding), (d_hidden, losses) = jax.lax.scan(add_chunk, start, (hidden, targets, weights))
    # The empty arrays carry dtypes only.
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
