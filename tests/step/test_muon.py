"""Muon against optax's own, and its products in half precision against fp32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgpt.config.defaults import default_config
from jgpt.model.matrices import join_kernel, split_kernel
from jgpt.model.parameters import abstract_params
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.step.muon import POLAR_EXPRESS, SAFETY, UPDATE_RMS, orthogonalize
from jgpt.step.optimizer import make_optimizer

SHAPES = ModelConfig(32, 8, n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, d_head=4, d_ff=24, qkv_bias=True)


def random_tree(seed: int) -> Any:
    def leaf(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        random = np.random.default_rng([seed, *str(path).encode()])
        return jnp.asarray(random.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(SHAPES))


def names(path: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def alone(tree: Any) -> dict[str, jax.Array]:
    """Return query, key, value, gate, up and all other kernels, a matrix each: as optax's Muon takes them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    kernels = [(names(path), leaf) for path, leaf in leaves if names(path)[-1] == "kernel"]
    return {f"{path} {i}": matrix for path, kernel in kernels for i, matrix in enumerate(split_kernel(path, kernel))}


def test_each_matrix_has_optaxs_muon_and_the_rest_adamw():
    """Query, key, value, gate and up each for itself; optax's Muon is given the same polynomials."""
    o = default_config().optimizer
    o.update(kind="muon", learning_rate=1e-3, muon_learning_rate=0.02, warmup_steps=0, weight_decay=0.3, clip_norm=0.0)
    params, gradients = random_tree(0), random_tree(1)
    optimizer = make_optimizer(o)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)

    powers = np.array([1, 3, 5])
    polynomials = POLAR_EXPRESS / SAFETY**powers
    polynomials[0] = polynomials[0] / SAFETY**powers  # ours divides the matrix itself by it
    muon = optax.contrib.muon(
        0.02, ns_coeffs=tuple(map(tuple, polynomials)), weight_decay=0.3, consistent_rms=UPDATE_RMS
    )
    matrices = alone(params)
    assert len(matrices) == SHAPES.n_layers * 7
    expected, _ = muon.update(alone(gradients), muon.init(matrices), matrices)
    found = alone(updates)
    for name, update in expected.items():
        np.testing.assert_allclose(found[name], update, rtol=1e-3, atol=2e-6, err_msg=name)

    o.kind = "adamw"
    adamw = make_optimizer(o)
    plain, _ = adamw.update(gradients, adamw.init(params), params)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(plain), strict=True):
        assert (names(path)[-1] == "kernel") != bool(np.array_equal(x, y)), path
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, matrices)]
    assert moments == 2 * (sizes[0] - sizes[1]) + sizes[1]  # one for a matrix, two for the rest


@pytest.mark.parametrize(
    "path, shape",
    [
        (("attn", "qkv", "kernel"), (6, 2, 4, 3)),
        (("mlp", "gate_up", "kernel"), (6, 1, 2, 5)),
        (("mlp", "down", "kernel"), (6, 5)),
    ],
)
def test_a_kernel_taken_apart_and_joined_is_itself(path: tuple[str, ...], shape: tuple[int, ...]):
    kernel = jnp.arange(float(np.prod(shape))).reshape(shape)
    np.testing.assert_array_equal(join_kernel(path, split_kernel(path, kernel), shape), kernel)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("compute, error", [(jnp.float16, 0.02), (jnp.bfloat16, 0.15)])
def test_half_precision_is_near_fp32_at_every_scale(scale: float, compute: Any, error: float):
    """Of a random matrix, one of almost rank 1 as gradients are, and nothing at all."""
    random = np.random.default_rng(0)
    steep = random.normal(size=(48, 96)) * np.geomspace(1, 1e-4, 48)[:, None]
    stack = jnp.asarray(np.stack([random.normal(size=(48, 96)), steep, np.zeros((48, 96))]) * scale, jnp.float32)
    exact, half = orthogonalize(stack, Policy()), orthogonalize(stack, Policy(compute=compute))
    assert half.dtype == compute
    singular = np.linalg.svd(np.asarray(exact[0], np.float64), compute_uv=False)
    assert 0.8 < singular.min() and singular.max() < 1.2
    for a, b in zip(exact[:2], half.astype(jnp.float32)[:2], strict=True):
        assert jnp.linalg.norm(a - b) <= error * jnp.linalg.norm(a)
    assert not exact[2].any() and not half[2].any()
