"""LoRA by identities: new adapters change nothing, trained ones are what their merger is, and nothing else moves."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.model.gpt import GPT, unembedding
from jgpt.model.lora import LoRA, init_adapters, merge
from jgpt.model.parameters import abstract_adapters, abstract_params, count_parameters
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.replicate import Replicate
from jgpt.step.eval_step import make_eval_step
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import init_state
from jgpt.step.train_step import Step

V, T = 48, 12
LLAMA = ModelConfig(V, T, n_layers=1, n_heads=4, n_kv_heads=2, d_model=16, d_head=4, d_ff=24)
GPT2 = ModelConfig(
    V, T, 1, 4, 4, 16, 4, 32, position="learned", norm="layernorm", mlp="gelu", bias=True, tie_embeddings=False
)
FAMILIES = pytest.mark.parametrize("shapes", [LLAMA, GPT2], ids=["llama", "gpt2"])
RANK_2 = LoRA(2, 4.0)


def random(abstract: Any, seed: int) -> Any:
    """Make parameters of these shapes, none of them zero, without compiling anything."""
    draw = np.random.default_rng(seed)

    def value(path: Any, x: Any) -> np.ndarray:
        return draw.normal(path[-1].key == "scale", 0.15, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, abstract)


@cache
def base(shapes: ModelConfig) -> Any:
    return random(abstract_params(shapes), 0)


@cache
def adapters(shapes: ModelConfig, lora: LoRA = RANK_2) -> Any:
    """Make adapters as training leaves them."""
    return random(abstract_adapters(shapes, lora), 1)


def tokens(seed: int, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, T + 1)).astype(np.int32)


def logits(model: GPT, variables: Any) -> jax.Array:
    def apply(v: Any) -> jax.Array:
        output: Any = model.apply(v, tokens(9)[:, :-1])
        return output.hidden @ unembedding(v["params"]).T

    return jax.jit(apply)(variables)


@FAMILIES
def test_new_adapters_change_nothing(shapes: ModelConfig):
    model = GPT(shapes, lora=RANK_2)
    new = jax.jit(lambda: init_adapters(model, jax.random.key(1)))()
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(new)} == {"a", "b"}
    with_new = logits(model, {"params": base(shapes), "lora": new})
    np.testing.assert_array_equal(with_new, logits(GPT(shapes), {"params": base(shapes)}))


@FAMILIES
@pytest.mark.parametrize("targets", [("qkv", "proj", "gate_up", "up", "down"), ("down",), ("qkv", "proj")])
def test_merged_is_base_and_adapters(shapes: ModelConfig, targets: tuple[str, ...]):
    lora = LoRA(3, 2.0, targets=targets)
    trained, params = adapters(shapes, lora), base(shapes)
    assert {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} <= set(targets)
    merged = jax.tree_util.tree_map_with_path(
        lambda path, x: merge(tuple(key.key for key in path), x, trained, lora), params
    )
    together = logits(GPT(shapes, lora=lora), {"params": params, "lora": trained})
    np.testing.assert_allclose(logits(GPT(shapes), {"params": merged}), together, atol=2e-4)
    assert np.abs(together - logits(GPT(shapes), {"params": params})).max() > 0.05
    changed = jax.tree_util.tree_map_with_path(lambda path, x, y: (path[-2].key, bool((x != y).any())), params, merged)
    for name, differs in jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, tuple)):
        assert not differs or name in targets


def test_merging_keeps_the_dtype_and_adds_in_fp32():
    """An update below half of fp16's last bit is lost by the kernel's dtype alone, once, at the end."""
    kernel = np.full((4, 3), 1, np.float16)
    adapter = {"h_0": {"mlp": {"up": {"a": np.full((4, 2), 2.0**-6), "b": np.full((2, 3), 2.0**-6)}}}}
    merged = merge(("h_0", "mlp", "up", "kernel"), kernel, adapter, LoRA(2, 2.0 * 2))
    assert merged.dtype == np.float16 and (merged == 1 + 2.0**-10).all()
    bias = np.ones(3, np.float32)
    assert merge(("h_0", "mlp", "up", "bias"), bias, adapter, RANK_2) is bias


@cache
def training(devices: int) -> Any:
    """Return (runner, train step, eval step, first state) of LoRA on the Llama."""
    model = GPT(LLAMA, lora=RANK_2)
    o = default_config().optimizer
    o.update({"warmup_steps": 1, "total_steps": 20, "learning_rate": 0.05})
    optimizer, policy, runner = make_optimizer(o), Policy(), Replicate(jax.local_devices()[:devices])
    step = Step(
        model,
        policy,
        optimizer,
        learning_rate_schedule(o),
        accumulation=8 // devices // 2,
        seed=3,
        loss_chunk_tokens=16,
        growth_steps=1000,
    )
    first = jax.jit(lambda: init_state(model, policy, optimizer, 5, 1.0))()
    return runner, runner.train_step(step), runner.eval_step(make_eval_step(model, policy, 16)), first


def train(devices: int, steps: int) -> tuple[Any, Any, list[float]]:
    runner, step, _, first = training(devices)
    frozen = jax.tree_util.tree_map_with_path(
        lambda path, x: runner.place_param(tuple(key.key for key in path), x), base(LLAMA)
    )
    state, losses = runner.place_state(jax.tree.map(np.asarray, first)), []
    for _ in range(steps):
        batch = runner.place_batch(Batch(tokens(0)), 8 // devices // 2)
        state, metrics = step(state, frozen, batch)
        losses.append(float(runner.on_host(metrics)["loss"]))
    return runner.on_host(state), runner.on_host(frozen), losses


def test_training_moves_the_adapters_and_not_the_base():
    state, frozen, losses = train(2, 8)
    for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(base(LLAMA)), strict=True):
        assert x.tobytes() == y.tobytes()
    first = training(2)[3].params
    assert all((x != y).all() for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(first), strict=True))
    assert losses[-1] < losses[0] - 0.1
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state) if len(path) > 3}
    assert names == {"a", "b"}  # no moment of a frozen parameter


def test_first_loss_is_the_base_models():
    runner, _, evaluate, first = training(2)
    frozen = runner.place_state(base(LLAMA))
    weights = np.ones((8, T), np.float32)
    batch = runner.place_sequences(Batch(tokens(0), weights))
    plain = runner.eval_step(make_eval_step(GPT(LLAMA), Policy(), 16))
    assert float(evaluate(runner.place_state(first.params), frozen, batch)) == float(plain(frozen, {}, batch))


def test_two_devices_are_one():
    (one, _, losses_of_one), (two, _, losses_of_two) = train(1, 3), train(2, 3)
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)


def test_dropout_is_on_in_training_alone():
    model, frozen = GPT(LLAMA, lora=LoRA(2, 4.0, dropout=0.5)), {"params": base(LLAMA), "lora": adapters(LLAMA)}
    plain = logits(GPT(LLAMA, lora=RANK_2), frozen)
    np.testing.assert_array_equal(logits(model, frozen), plain)
    rngs = {"dropout": jax.random.key(0)}
    output: Any = jax.jit(lambda v: model.apply(v, tokens(9)[:, :-1], deterministic=False, rngs=rngs))(frozen)
    assert np.abs(output.hidden @ base(LLAMA)["wte"]["embedding"].T - plain).max() > 0.01


def test_adapters_are_a_small_part_of_smollm2():
    """Rank 16 on every layer of SmolLM2-135M: under 5% of what a checkpoint of all parameters takes."""
    shapes = ModelConfig(49152, 8192, n_layers=30, n_heads=9, n_kv_heads=3, d_model=576, d_head=64, d_ff=1536)
    made = jax.tree.leaves(abstract_adapters(shapes, LoRA(16, 16.0)))
    assert count_parameters(shapes) == 134_515_008
    assert 0.03 < sum(leaf.size for leaf in made) / 134_515_008 < 0.05
