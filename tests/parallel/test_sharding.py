"""One model over two devices against the same model on one: hidden states, text, collectives, bytes."""

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.model.columns import for_devices, regroup, regroup_tree
from jgpt.model.gpt import GPT
from jgpt.model.kv_cache import empty_cache
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.rules import device_mesh, param_shardings, partition_spec, place, split_bytes

SIZES = dict(vocab_size=62, context_length=24, n_layers=2, d_model=32, d_head=8, norm_eps=1e-5)
CONFIGS = {
    "even": ModelConfig(**SIZES, n_heads=4, n_kv_heads=2, d_ff=48, qkv_bias=True, tie_embeddings=False),
    "repeated": ModelConfig(**SIZES, n_heads=4, n_kv_heads=1, d_ff=50, qkv_bias=True, qk_norm=True),
    "thrice": ModelConfig(**SIZES, n_heads=6, n_kv_heads=3, d_ff=48, bias=True),
    "odd heads": ModelConfig(**SIZES, n_heads=3, n_kv_heads=3, d_ff=48, qk_norm=True, tie_embeddings=False),
    "odd mlp": ModelConfig(**SIZES, n_heads=4, n_kv_heads=4, d_ff=45, bias=True),
    "odd vocabulary": ModelConfig(**{**SIZES, "vocab_size": 63}, n_heads=4, n_kv_heads=2, d_ff=48),
    "gpt2": ModelConfig(
        **SIZES, n_heads=4, n_kv_heads=4, d_ff=64, position="learned", norm="layernorm", mlp="gelu", bias=True
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", CONFIGS)
TOKENS = np.random.default_rng(0).integers(0, 62, (2, 11)).astype(np.int32)
PROMPTS = [[1, 2, 3], [4]]


@cache
def plain(name: str) -> Any:
    """Random parameters, large enough that tokens differ clearly in likelihood, as numpy arrays."""
    shapes = jax.eval_shape(GPT(CONFIGS[name]).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: random.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32), shapes
    )


@cache
def split(name: str) -> tuple[GPT, Any]:
    """Return the model as two devices share it, and its parameters, placed one by one."""
    config, mesh = for_devices(CONFIGS[name], 2), device_mesh(jax.local_devices())

    def put(path: tuple, x: np.ndarray) -> jax.Array:
        return place(tuple(key.key for key in path), x, config, mesh)

    return GPT(config), jax.tree_util.tree_map_with_path(put, plain(name))


def hidden(model: GPT) -> Any:
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).hidden)


@every
def test_hidden_states_are_those_of_one_device(name: str):
    model, params = split(name)
    found = hidden(model)(params, TOKENS)
    np.testing.assert_allclose(found, hidden(GPT(CONFIGS[name]))(plain(name), TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["repeated", "odd heads"])
def test_greedy_text_is_that_of_one_device(name: str):
    def text(model: GPT, params: Any) -> list[list[int]]:
        return generate(
            model, {"params": params}, PROMPTS, sampling=Sampling(temperature=0), max_new_tokens=12, stop_ids=(0,),
            n_ids=60, seed=0,
        )  # fmt: skip

    found = text(*split(name))
    assert found == text(GPT(CONFIGS[name]), plain(name))
    assert len({id for ids in found for id in ids}) > 3  # or a constant would pass


@every
def test_devices_exchange_sums_only(name: str):
    """Two all-reduces a block and one for the embedding, where those are split; no parameter is gathered."""
    model, params = split(name)
    program = hidden(model).lower(params, TOKENS).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute", program)
    whole = {"odd heads": 2, "odd mlp": 2, "odd vocabulary": 1}.get(name, 0)
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 5 - whole


@pytest.mark.parametrize("name", ["even", "repeated", "gpt2"])
def test_decoding_one_token_gathers_neither_the_embedding_nor_the_cache(name: str):
    model, params = split(name)
    c = model.config
    sharding = NamedSharding(device_mesh(jax.local_devices()), PartitionSpec(None, "tensor"))  # by heads
    cache = jax.device_put(empty_cache(c.n_layers, 1, 24, c.n_kv_heads, c.d_head, jnp.float32), sharding)
    step = jax.jit(lambda params, token, place, cache: model.apply({"params": params}, token, place, cache))
    compiled = step.lower(params, TOKENS[:1, :1], np.array([[5]], np.int32), cache).compile()
    assert not re.search(r"all-gather|all-to-all|collective-permute", compiled.as_text())
    for layer in jax.tree.leaves(compiled.output_shardings.cache):
        assert layer.shard_shape((1, 4, 24, 8)) == (1, 2, 24, 8)


@every
def test_bytes_on_each_device_are_as_promised(name: str):
    model, params = split(name)
    mesh = device_mesh(jax.local_devices())
    promised = split_bytes(params, param_shardings(params, model.config, mesh))
    for device in jax.local_devices():
        shards = [s for x in jax.tree.leaves(params) for s in x.addressable_shards if s.device == device]
        assert sum(shard.data.nbytes for shard in shards) == promised
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert total / 2 < promised < total * (0.52 if name in ("even", "repeated", "thrice") else 0.85)


def test_what_is_split():
    config = for_devices(CONFIGS["even"], 2)

    def spec(name: str, *shape: int) -> PartitionSpec:
        return partition_spec(tuple(name.split("/")), shape, config, 2)

    assert spec("h_0/attn/qkv/kernel", 32, 2, 4, 8) == PartitionSpec(None, "tensor")
    assert spec("h_0/attn/qkv/bias", 2, 4, 8) == PartitionSpec("tensor")
    assert spec("h_0/attn/proj/kernel", 32, 32) == PartitionSpec("tensor")
    assert spec("h_0/mlp/gate_up/kernel", 32, 2, 2, 24) == PartitionSpec(None, "tensor")
    assert spec("h_0/mlp/down/kernel", 32, 48) == PartitionSpec(None, "tensor")
    assert spec("wte/embedding", 62, 32) == spec("lm_head/embedding", 62, 32) == PartitionSpec("tensor")
    for name in ("h_0/attn/proj/bias", "h_0/mlp/down/bias", "h_0/mlp_norm/scale", "norm/bias", "h_0/attn/qkv/a"):
        assert spec(name, 32) == PartitionSpec()


def test_a_repeated_head_serves_half_of_its_queries_on_each_device():
    config = for_devices(CONFIGS["repeated"], 2)
    kernel = np.arange(6.0).reshape(1, 1, 6, 1)  # D=1, K=1: four queries, their key, their value
    found = regroup(("h_0", "attn", "qkv", "kernel"), kernel, config)
    assert found[0, :, :, 0].tolist() == [[0, 1, 4, 5], [2, 3, 4, 5]]
    assert np.array_equal(regroup(("h_0", "attn", "qkv", "kernel"), jnp.asarray(kernel), config), found)


def test_columns_of_gate_and_up_go_together():
    config = for_devices(CONFIGS["even"], 2)
    bias = np.stack([np.arange(48), 100 + np.arange(48)])[None]  # gate, up
    found = regroup(("h_0", "mlp", "gate_up", "bias"), bias, config)
    assert found.shape == (2, 2, 24) and found[:, :, 0].tolist() == [[0, 100], [24, 124]]


def test_one_device_changes_nothing():
    config = CONFIGS["even"]
    assert for_devices(config, 1) == config
    jax.tree.map(np.testing.assert_array_equal, regroup_tree(plain("even"), config), plain("even"))


def test_regrouping_twice_is_regrouping_once():
    for name in CONFIGS:
        config = for_devices(CONFIGS[name], 2)
        once = regroup_tree(plain(name), config)
        jax.tree.map(np.testing.assert_array_equal, regroup_tree(once, config), once)


def test_heads_that_do_not_divide_stay_whole():
    shared = for_devices(CONFIGS["even"], 4)
    assert (shared.n_kv_heads, shared.n_heads, shared.mlp_groups) == (4, 4, 4)
    assert for_devices(CONFIGS["thrice"], 4).n_kv_heads == 3  # 2 queries a head cannot go to 4 copies
