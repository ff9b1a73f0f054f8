"""Safetensors in and out: what is on disk is what is loaded, and what is not whole is refused before it is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jgpt.errors import UserError
from jgpt.exchange.read_weights import Stored, find_tensors, load_params, main_dtype, match
from jgpt.exchange.tensors import prefix, table
from jgpt.exchange.write_weights import save_params
from jgpt.model.parameters import abstract_params
from jgpt.model.shapes import ModelConfig

OWN = ModelConfig(11, 8, 2, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_ff=6)
INDEX = "model.safetensors.index.json"


def loaded(
    directory: Path,
    dtype: Any = np.float32,
    family: str = "llama",
    shapes: ModelConfig = OWN,
    place: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, array: array,
) -> Any:
    tensors = opened(directory, family, shapes)
    return load_params(tensors, table(family, shapes), dtype, place, tied=shapes.tie_embeddings)


def opened(directory: Path, family: str = "llama", shapes: ModelConfig = OWN) -> dict[str, Stored]:
    return match(find_tensors(directory), table(family, shapes), family, shapes.tie_embeddings)


def random_params(shapes: ModelConfig = OWN) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(shapes))


def save(directory: Path, params: Any, family: str = "llama", shapes: ModelConfig = OWN, **options: Any) -> None:
    directory.mkdir(exist_ok=True)
    options = {"dtype": np.float32, "shard_bytes": 10**9} | options
    save_params(directory, params, list(table(family, shapes)), prefix(family), **options)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("llama", OWN), ("llama", replace(OWN, bias=True, tie_embeddings=False)), ("mistral", OWN),
        ("qwen2", replace(OWN, qkv_bias=True)), ("qwen3", replace(OWN, qk_norm=True, qkv_bias=True)),
        ("gpt2", replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu", bias=True)),
        ("gpt2", replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu")),
    ],
)  # fmt: skip
def test_out_and_in_again_bit_for_bit(family, shapes, tmp_path):
    params = random_params(shapes)
    save(tmp_path / "one", params, family, shapes)
    same(loaded(tmp_path / "one", family=family, shapes=shapes), params)
    save(tmp_path / "many", params, family, shapes, shard_bytes=500)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    same(loaded(tmp_path / "many", family=family, shapes=shapes), params)
    merged = {name: x for path in shards for name, x in load_file(path).items()}
    same(merged, load_file(tmp_path / "one" / "model.safetensors"))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in merged.values())
    assert index["weight_map"].keys() == merged.keys()


def test_biases_that_the_gpt_has_not_are_zeros_in_the_file(tmp_path):
    shapes = replace(OWN, qk_norm=True, qkv_bias=True)
    save(tmp_path, random_params(shapes), "qwen3", shapes)
    file = load_file(tmp_path / "model.safetensors")
    assert not file["model.layers.0.self_attn.o_proj.bias"].any() and file["model.layers.0.self_attn.q_proj.bias"].any()
    file["model.layers.1.self_attn.o_proj.bias"][3] = 0.1
    save_file(file, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="o_proj.bias is not zero"):
        loaded(tmp_path, family="qwen3", shapes=shapes)


def test_names_without_the_prefix_and_harmless_extras(tmp_path):
    params = random_params()
    save(tmp_path, params)
    file = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): x for name, x in file.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    bare["lm_head.weight"] = bare["embed_tokens.weight"].copy()
    save_file(bare, tmp_path / "model.safetensors")
    same(loaded(tmp_path), params)
    bare["lm_head.weight"][0, 0] += 1
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings.*differs"):
        loaded(tmp_path)

    gpt2 = replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu", bias=True)
    params = random_params(gpt2)
    save(tmp_path, params, "gpt2", gpt2)
    file = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): x for name, x in file.items()}
    old |= {f"h.0.attn.{name}": np.ones((1, 1, 8, 8), np.float32) for name in ("bias", "masked_bias")}
    save_file(old, tmp_path / "model.safetensors")
    same(loaded(tmp_path, family="gpt2", shapes=gpt2), params)


def test_dtypes(tmp_path):
    params = random_params()
    save(tmp_path, params, dtype=jnp.bfloat16)
    assert main_dtype(opened(tmp_path)) == "bf16"
    placed = []

    def place(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        placed.append(path)
        return array

    narrow = loaded(tmp_path, np.float16, place=place)
    kernel = params["h_0"]["attn"]["qkv"]["kernel"]
    assert narrow["h_0"]["attn"]["qkv"]["kernel"].dtype == np.float16
    assert np.array_equal(narrow["h_0"]["attn"]["qkv"]["kernel"], kernel.astype(jnp.bfloat16).astype(np.float16))
    assert narrow["norm"]["scale"].dtype == np.float32
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert sorted(placed) == sorted(tuple(key.key for key in path) for path, _ in leaves)
    same(loaded(tmp_path, jnp.bfloat16)["wte"], {"embedding": params["wte"]["embedding"].astype(jnp.bfloat16)})


def test_what_fp16_cannot_hold(tmp_path):
    params = random_params()
    params["h_1"]["mlp"]["down"]["kernel"][0, 0] = -70_000
    save(tmp_path, params, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj.weight in .* its largest value is 70144.*bf16 .*fp32"):
        loaded(tmp_path, np.float16)
    assert loaded(tmp_path, np.float32)["h_1"]["mlp"]["down"]["kernel"][0, 0] == -70144
    with pytest.raises(UserError, match="down_proj.weight does not fit in fp16"):
        save(tmp_path / "out", params, dtype=np.float16)
    params["h_1"]["mlp"]["down"]["kernel"][0, 0] = np.nan
    save(tmp_path, params)
    with pytest.raises(UserError, match="holds nan"):
        loaded(tmp_path, np.float16)


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        opened(directory)
    for part in parts:
        assert part in str(error.value)


def test_a_file_that_is_not_whole(tmp_path):
    save(tmp_path, random_params())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:9], b"", whole + b"x", b"version https://git-lfs..."):
        path.write_bytes(damaged)
        refused(tmp_path, f"{path} is not a complete safetensors file", "Download it again")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    refused(tmp_path, "is not a complete safetensors", "It is a git-lfs pointer", f"cd {tmp_path} && git lfs pull")
    path.write_text("<!DOCTYPE html><title>Sign in</title>" + "x" * 99)
    refused(tmp_path, "is not a complete safetensors", "It is a web page")
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    refused(tmp_path, "is not a complete safetensors file", "offset")


def test_tensors_that_do_not_fit_are_named_with_both_shapes(tmp_path):
    save(tmp_path, random_params())
    path = tmp_path / "model.safetensors"
    file = load_file(path)
    del file["model.layers.0.mlp.up_proj.weight"]
    file["model.norm.weight"] = np.ones(9, np.float32)
    file["model.layers.1.self_attn.q_norm.weight"] = np.ones(2, np.float32)
    file["model.layers.0.self_attn.o_proj.weight"] = np.ones((8, 8), np.int8)
    save_file(file, path)
    refused(
        tmp_path, "model.layers.0.mlp.up_proj.weight is missing (wanted: [6, 8])",
        "model.norm.weight is [9] (wanted: [8])", "q_norm.weight [2] has no place in a llama model",
        "o_proj.weight is of dtype I8 (wanted: F32, F16 or BF16)",
    )  # fmt: skip
    save_file({"other": np.ones(1, np.float32)}, path)
    refused(tmp_path, "model.embed_tokens.weight is missing (wanted: [11, 8])", "and 16 more")


def test_only_safetensors_are_opened(tmp_path):
    refused(tmp_path, "has no weights in safetensors", "pickles (.bin, .pt) are never opened", "save_pretrained")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(tmp_path, "has no weights in safetensors, only pytorch_model.bin", "Convert them where you trust them")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(tmp_path, f"no {INDEX}", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("name", ["a" * 5000 + ".safetensors", "a\0.safetensors", "../a.safetensors"])
def test_a_shard_of_no_such_name(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError) as error:
        find_tensors(tmp_path)
    assert INDEX in str(error.value) and len(str(error.value)) < 1000


def test_the_index_of_shards(tmp_path):
    save(tmp_path, random_params(), shard_bytes=500)
    path = tmp_path / INDEX
    index = json.loads(path.read_text())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    for name in ("../x.safetensors", "/etc/x.safetensors", "below/x.safetensors", "..", "pytorch_model.bin", ""):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.norm.weight": name}}))
        refused(tmp_path, f"names the file {name!r}", "Do not use this model")
    for text in ("not json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        path.write_text(text)
        refused(tmp_path, f"{path} is not an index of safetensors")
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.norm.weight": shard.name}}))
    refused(tmp_path, f"{shard} lacks 1 tensors", "such as model.norm.weight")
    path.write_text(json.dumps(index))
    shard.unlink()
    refused(tmp_path, f"{shard} is missing", "Download it again")
