"""A LoRA step over two devices that share one model against the same step on one."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.model.columns import for_devices
from jgpt.model.gpt import GPT
from jgpt.model.lora import LoRA
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.replicate import Replicate
from jgpt.parallel.tensor_parallel import TensorParallel
from jgpt.step.eval_step import make_eval_step
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import init_state
from jgpt.step.train_step import Step, variables

T, STEPS, SEED = 12, 3, 5
# One key/value head, whose two copies must learn as one; an MLP that is split.
CONFIG = ModelConfig(
    vocab_size=64, context_length=T, n_layers=1, n_heads=4, n_kv_heads=1, d_model=16, d_head=4, d_ff=24, dropout=0.1,
    qkv_bias=True, tie_embeddings=False,
)  # fmt: skip
ADAPTERS = LoRA(rank=2, alpha=4.0, dropout=0.1)
POLICY = Policy()


@cache
def base() -> Any:
    shapes = jax.eval_shape(GPT(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: random.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32), shapes
    )


class Trained:
    """Three steps of two micro-batches of two sequences, by a runner."""

    def __init__(self, runner: Replicate | TensorParallel, shapes: ModelConfig) -> None:
        options = default_config().optimizer
        options.update(warmup_steps=0, learning_rate=0.02)
        optimizer, self.model = make_optimizer(options), GPT(shapes, lora=ADAPTERS)
        schedule = learning_rate_schedule(options)
        self.step = runner.train_step(
            Step(
                self.model,
                POLICY,
                optimizer,
                schedule,
                accumulation=2,
                seed=SEED,
                loss_chunk_tokens=8,
                growth_steps=1000,
            )
        )
        plain = GPT(CONFIG, lora=ADAPTERS)
        state = runner.place_state(jax.jit(lambda: init_state(plain, POLICY, optimizer, SEED, 1.0))())

        def put(path: tuple, x: np.ndarray) -> jax.Array:
            return runner.place_param(tuple(key.key for key in path), x)

        self.runner, self.frozen = runner, jax.tree_util.tree_map_with_path(put, base())
        self.first, self.losses = state, []
        for number in range(STEPS):
            state, metrics = self.step(state, self.frozen, runner.place_batch(batch(number), 2))
            self.losses.append(float(runner.on_host(metrics)["loss"]))
        self.state = state


def batch(number: int) -> Batch:
    """Return two micro-batches of two sequences, [4, T + 1], with weights and texts that share a row."""
    random = np.random.default_rng(number)
    shape = 4, T
    weights = (random.random(shape) > 0.3).astype(np.float32)
    segments = np.broadcast_to(np.arange(T) // 7, shape).astype(np.int32)
    return Batch(random.integers(0, 64, (4, T + 1)).astype(np.int32), weights, segments)


@cache
def one() -> Trained:
    return Trained(Replicate(jax.local_devices()[:1]), CONFIG)


@cache
def two() -> Trained:
    shapes = for_devices(CONFIG, 2)
    return Trained(TensorParallel(jax.local_devices(), shapes), shapes)


@cache
def groups() -> Trained:
    """Two groups of one device: each has the whole base, and half of the batch (data=2,tensor=1)."""
    return Trained(TensorParallel(jax.local_devices(), CONFIG, group=1), CONFIG)


@pytest.mark.parametrize("several", [two, groups])
def test_two_devices_train_as_one(several: Callable[[], Trained]):
    """Losses, adapters and moments over three steps, with dropout, to the rounding of fp32 sums."""
    np.testing.assert_allclose(several().losses, one().losses, rtol=1e-5)
    found, expected = (trained.runner.on_host(trained.state) for trained in (several(), one()))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    assert all(np.any(x) for x in jax.tree.leaves(found.params))  # b began at zero


def test_the_base_stays_as_it_was():
    def put(path: tuple, x: np.ndarray) -> jax.Array:
        return two().runner.place_param(tuple(key.key for key in path), x)

    fresh = jax.tree_util.tree_map_with_path(put, base())
    for x, y in zip(jax.tree.leaves(two().frozen), jax.tree.leaves(fresh), strict=True):
        assert x.sharding == y.sharding and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_state_is_whole_on_each_device_and_its_memory_is_reused():
    trained = two()
    assert all(x.is_deleted() for x in jax.tree.leaves(trained.first))
    assert all(x.is_fully_replicated for x in jax.tree.leaves(trained.state))
    assert trained.step._cache_size() == 1  # type: ignore[attr-defined]


def test_no_frozen_parameter_moves():
    """What one device fetches from the other is no more than the adapters' gradients."""
    trained = two()
    placed = trained.runner.place_batch(batch(0), 2)
    program = trained.step.lower(trained.state, trained.frozen, placed).compile().as_text()  # type: ignore[attr-defined]
    results = re.findall(r"= (.*) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)
    ]
    assert sum(sizes) <= sum(x.size for x in jax.tree.leaves(trained.state.params))


def test_evaluation_is_that_of_one_device():
    def total(trained: Trained) -> float:
        runner = trained.runner
        step = runner.eval_step(make_eval_step(trained.model, POLICY, 8))
        placed = runner.place_sequences(jax.tree.map(lambda x: x[:2], batch(9)))
        return float(runner.on_host(step(trained.state.params, trained.frozen, placed)))

    assert [total(two()), total(groups())] == pytest.approx([total(one())] * 2, rel=1e-5)


def test_texts_while_it_trains_are_those_of_one_device():
    def text(trained: Trained) -> list[list[int]]:
        adapters, frozen = (trained.runner.for_decoding(tree) for tree in (trained.state.params, trained.frozen))
        return generate(
            trained.model, variables(trained.model, adapters, frozen), [[1, 2, 3]], sampling=Sampling(temperature=0),
            max_new_tokens=8, stop_ids=(), n_ids=64, seed=0,
        )  # fmt: skip

    assert text(two()) == text(one())
