"""The optimizer against its formulas: schedule, decay mask, clip, AdamW."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.model.parameters import abstract_params
from jgpt.model.shapes import model_config
from jgpt.step.optimizer import decayed, learning_rate_schedule, make_optimizer


def settings(**changes: Any) -> ConfigDict:
    config = default_config().optimizer
    config.update(changes)
    return config


def expected_rate(o: ConfigDict, step: int) -> float:
    if step < o.warmup_steps:
        first = o.learning_rate / (o.warmup_steps + 1)
        return first + (o.learning_rate - first) * step / o.warmup_steps
    if o.schedule == "wsd":
        decay = max(1, round(o.decay_fraction * o.total_steps))
        part = min(1.0, max(0.0, 1 - (o.total_steps - step) / decay))
        return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * (1 - math.sqrt(part))
    part = min(1.0, (step - o.warmup_steps) / (o.total_steps - o.warmup_steps))
    return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * 0.5 * (1 + math.cos(math.pi * part))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_steps": 0},
        {"warmup_steps": 1, "total_steps": 2},
        {"total_steps": 7, "warmup_steps": 6, "min_learning_rate": 0.0},
        {"total_steps": 5000, "warmup_steps": 100, "learning_rate": 6e-4, "min_learning_rate": 6e-4},
        {"schedule": "wsd"},
        {"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 1.0, "min_learning_rate": 0.0},
        {"schedule": "wsd", "warmup_steps": 800, "decay_fraction": 0.2},
        {"schedule": "wsd", "warmup_steps": 1, "total_steps": 3, "decay_fraction": 0.001},
    ],
    ids=str,
)
def test_schedule_in_closed_form(changes: dict[str, Any]):
    o = settings(**changes)
    steps = np.unique([*range(12), *np.linspace(0, o.total_steps, 60, dtype=int), o.total_steps + 1, 2 * o.total_steps])
    got = jax.vmap(learning_rate_schedule(o))(jnp.asarray(steps))
    np.testing.assert_allclose(got, [expected_rate(o, int(step)) for step in steps], rtol=1e-5, atol=1e-10)


def test_what_comes_before_the_decay_depends_on_no_number_of_steps():
    """Bit for bit: a run of 500 steps, of 800, and one whose steps are not known yet."""
    steps = jnp.arange(301)
    known = [jax.vmap(learning_rate_schedule(settings(schedule="wsd", total_steps=n)))(steps) for n in (500, 800)]
    np.testing.assert_array_equal(*known)
    assert known[0][300] == settings().learning_rate
    for schedule in ("wsd", "cosine"):
        warmup = [jax.vmap(learning_rate_schedule(settings(schedule=schedule, total_steps=n)))(steps) for n in (0, 500)]
        np.testing.assert_array_equal(warmup[0][:100], warmup[1][:100])


@pytest.mark.parametrize("gpt2", [True, False])
def test_decay_falls_on_matrices_alone(gpt2: bool):
    """On a real tree: kernels and embeddings, whatever their rank, and no bias, though qkv's has three axes."""
    model = default_config().model
    model.update({"n_layers": 2, "qk_norm": True, "bias": gpt2, "qkv_bias": not gpt2, "tie_embeddings": gpt2})
    model.update({"position": "learned", "norm": "layernorm", "mlp": "gelu"} if gpt2 else {})
    params = abstract_params(model_config(model, 300))
    by_name: dict[str, set[bool]] = {}
    for path, marked in jax.tree_util.tree_leaves_with_path(decayed(params)):
        by_name.setdefault(path[-1].key, set()).add(marked)
    assert by_name == {"kernel": {True}, "embedding": {True}, "scale": {False}, "bias": {False}}
    ranks = {
        path[-1].key: leaf.ndim
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["h_0"]["attn"]["qkv"])  # fmt: skip
    }
    assert ranks == {"kernel": 4, "bias": 3}


def test_no_clip_keeps_the_structure_of_the_state():
    """So a run may change clip_norm, warmup and decay when it goes on."""
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    states = [
        make_optimizer(settings(**changes)).init(params)
        for changes in ({}, {"clip_norm": 0.0}, {"warmup_steps": 0}, {"weight_decay": 0.0})
    ]
    assert len({jax.tree.structure(state) for state in states}) == 1


def numpy_adamw(o: ConfigDict, params: dict[str, Any], gradients: list[dict[str, Any]]) -> dict[str, Any]:
    """AdamW of Loshchilov and Hutter (algorithm 2), the gradient clipped by its global norm before."""
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for n, gradient in enumerate(gradients):
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        factor = min(1.0, o.clip_norm / norm) if o.clip_norm else 1.0
        for name, g in gradient.items():
            first[name] = o.beta1 * first[name] + (1 - o.beta1) * g * factor
            second[name] = o.beta2 * second[name] + (1 - o.beta2) * (g * factor) ** 2
            m, v = first[name] / (1 - o.beta1 ** (n + 1)), second[name] / (1 - o.beta2 ** (n + 1))
            decay = o.weight_decay * params[name] if name == "kernel" else 0.0
            params = params | {name: params[name] - expected_rate(o, n) * (m / (np.sqrt(v) + o.eps) + decay)}
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_adamw_in_closed_form(clip_norm: float):
    o = settings(clip_norm=clip_norm, warmup_steps=2, total_steps=10, learning_rate=0.1, weight_decay=0.3)
    random = np.random.default_rng(0)
    start = {"kernel": random.normal(size=(3, 4)), "bias": random.normal(size=4)}
    gradients = [{name: random.normal(size=value.shape) for name, value in start.items()} for _ in range(3)]
    optimizer = make_optimizer(o)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    for name, expected in numpy_adamw(o, start, gradients).items():
        np.testing.assert_allclose(params[name], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_first_moment_in_half_precision_takes_two_bytes_and_moves_little(kind: str):
    """Against fp32: the first update is the same, and those of ten differ by the rounding of bf16, 8 bits."""
    o = settings(kind=kind, warmup_steps=0, learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.0)
    random = np.random.default_rng(0)
    start = {"h_0": {"mlp": {"up": {"kernel": jnp.asarray(random.normal(size=(8, 16)), jnp.float32)}}}}
    gradients = [jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), start) for _ in range(10)]

    def trained(dtype: Any, steps: int) -> tuple[np.ndarray, Any]:
        optimizer, params = make_optimizer(o, first_moment=dtype), start
        first = state = optimizer.init(params)
        for gradient in gradients[:steps]:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        before, after = ([x.dtype for x in jax.tree.leaves(tree)] for tree in (first, state))
        assert before == after  # or the step compiles twice
        return np.asarray(jax.tree.leaves(params)[0] - jax.tree.leaves(start)[0]), state

    def moments(state: Any) -> list[np.dtype]:
        return [x.dtype for x in jax.tree.leaves(state) if x.shape == (8, 16)]

    (once, state), (same, full) = trained(jnp.bfloat16, 1), trained(jnp.float32, 1)
    np.testing.assert_allclose(once, same, rtol=1e-6)
    assert moments(full) == [np.float32] * (2 if kind == "adamw" else 1)
    assert moments(state) == [jnp.bfloat16, np.float32][: len(moments(full))]
    (found, _), (expected, _) = trained(jnp.bfloat16, 10), trained(jnp.float32, 10)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < difference < 0.03
