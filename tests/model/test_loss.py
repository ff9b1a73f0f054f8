"""The chunked loss equals the plain formula, values and gradients, and keeps no array of all logits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.model.loss import cross_entropy

B, T, D, V = 3, 7, 16, 50


def inputs(dtype=jnp.float32):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(B, T, D)), jnp.float32)
    unembedding = jnp.asarray(random.normal(size=(V, D)), dtype)
    targets = jnp.asarray(random.integers(0, V, (B, T)), jnp.int32)
    return hidden, unembedding, targets, jnp.asarray(random.random((B, T)), jnp.float32)


def plain(hidden, unembedding, targets, weights):
    log_probabilities = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden, unembedding))
    return -jnp.sum(jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0] * weights)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 5, 7, 1000])
def test_any_chunk_size_equals_the_plain_formula_with_gradients(chunk_tokens):
    hidden, unembedding, targets, weights = inputs()

    def both(function):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))(hidden, unembedding, weights)

    chunked = both(lambda h, u, w: 0.37 * cross_entropy(h, u, targets, w, chunk_tokens))
    expected = both(lambda h, u, w: 0.37 * plain(h, u, targets, w))
    for ours, theirs in zip(jax.tree.leaves(chunked), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    without_gradient = jax.jit(cross_entropy, static_argnums=4)(hidden, unembedding, targets, weights, chunk_tokens)
    np.testing.assert_allclose(0.37 * without_gradient, chunked[0], rtol=1e-6)


def test_uniform_logits_cost_log_of_the_vocabulary():
    hidden, unembedding, targets, _ = inputs()
    loss = cross_entropy(0 * hidden, unembedding, targets, jnp.ones((B, T)), 4)
    np.testing.assert_allclose(loss, B * T * math.log(V), rtol=1e-6)


def test_huge_logits_do_not_overflow():
    hidden, unembedding, targets, weights = inputs()
    loss, gradient = jax.value_and_grad(lambda h: cross_entropy(h, unembedding, targets, weights, 8))(1e4 * hidden)
    np.testing.assert_allclose(loss, plain(1e4 * hidden, unembedding, targets, weights), rtol=1e-4)
    assert np.isfinite(gradient).all()


def test_a_large_weight_does_not_overflow_fp16():
    """As where few of a batch's targets are learned: the others weigh nothing."""
    hidden, unembedding, targets, _ = inputs(jnp.float16)
    weights = jnp.zeros((B, T)).at[1, 2].set(512.0)

    def gradients(function, scale):
        return jax.grad(lambda h, u: function(h, u, targets, weights * scale) / scale, argnums=(0, 1))(
            hidden, unembedding
        )

    large, small = gradients(cross_entropy, 1.0), gradients(cross_entropy, 1 / 512)
    for ours, same in zip(large, small, strict=True):
        assert np.isfinite(ours).all() and np.abs(ours).max() > 1
        np.testing.assert_array_equal(ours, same)
    nothing = jax.grad(cross_entropy)(hidden, unembedding, targets, 0 * weights)
    np.testing.assert_array_equal(nothing, 0)


def test_no_float_array_holds_more_logits_than_one_chunk():
    tokens, vocabulary, chunk = 1024, 3000, 128
    hidden = jax.ShapeDtypeStruct((4, tokens // 4, 8), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((vocabulary, 8), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)
    weights = jax.ShapeDtypeStruct((4, tokens // 4), jnp.float32)

    def largest(chunk_tokens: int) -> int:
        step = jax.grad(lambda *x: cross_entropy(*x, chunk_tokens), argnums=(0, 1))
        text = jax.jit(step).lower(hidden, unembedding, targets, weights).compile().as_text()
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\bf\d+\[([\d,]+)\]", text))

    assert largest(0) == tokens * vocabulary  # the check sees what it should
    assert largest(chunk) == chunk * vocabulary


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_gradients_keep_small_probabilities(dtype):
    hidden, unembedding, targets, weights = inputs(dtype)
    weights = jnp.ones_like(weights)
    # As in training: a mean over very many tokens, whose gradient would be lost if it met fp16 unscaled.
    mean = 1e-6
    ours = jax.grad(lambda h, u: mean * cross_entropy(h, u, targets, weights, 8), argnums=(0, 1))(hidden, unembedding)
    rounded = hidden.astype(dtype).astype(jnp.float32), unembedding.astype(jnp.float32)
    theirs = jax.grad(lambda h, u: mean * plain(h, u, targets, weights), argnums=(0, 1))(*rounded)
    assert ours[0].dtype == jnp.float32 and ours[1].dtype == dtype
    tolerance = 0.01 if dtype == jnp.float16 else 0.05
    np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance, atol=tolerance * np.abs(theirs[0]).max())
    if dtype == jnp.bfloat16:  # in fp16 the unembedding's own gradient needs the loss scale, as every other does
        np.testing.assert_allclose(
            ours[1].astype(jnp.float32), theirs[1], rtol=tolerance, atol=tolerance * np.abs(theirs[1]).max()
        )


def test_a_probability_of_a_millionth_still_pushes_in_fp16():
    """The gradient of a token that is almost certain: 1e-6 is below fp16's normal range, and must come through."""
    hidden = jnp.ones((1, 1, 1), jnp.float32)
    unembedding = jnp.asarray([[13.8], [0.0]], jnp.float16)  # softmax: 1 - 1e-6, 1e-6
    weights = jnp.ones((1, 1), jnp.float32)
    gradient = jax.grad(cross_entropy, argnums=1)(hidden, unembedding, jnp.zeros((1, 1), jnp.int32), weights)
    np.testing.assert_allclose(gradient[1, 0], 1e-6, rtol=0.1)
