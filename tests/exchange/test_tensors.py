"""The names, shapes and order of the weights of others, against arrays that are written out by hand."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jgpt.exchange.tensors import prefix, table
from jgpt.model.parameters import abstract_params
from jgpt.model.shapes import ModelConfig

OWN = ModelConfig(7, 5, 2, n_heads=6, n_kv_heads=2, d_model=4, d_head=2, d_ff=3)
GPT2 = replace(OWN, n_heads=2, position="learned", norm="layernorm", mlp="gelu", bias=True)
MODELS = [
    ("gpt2", GPT2), ("gpt2", replace(GPT2, tie_embeddings=False)), ("gpt2", replace(GPT2, bias=False)),
    ("gpt2", replace(GPT2, bias=False, qkv_bias=True)), ("llama", OWN), ("llama", replace(OWN, bias=True)),
    ("llama", replace(OWN, qkv_bias=True)), ("mistral", replace(OWN, tie_embeddings=False)),
    ("qwen2", replace(OWN, qkv_bias=True)), ("qwen3", replace(OWN, qk_norm=True)),
    ("qwen3", replace(OWN, qk_norm=True, qkv_bias=True)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "shapes"), MODELS)
def test_a_table_holds_the_whole_tree_and_its_rules_undo_one_another(family, shapes):
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(shapes))
    tree = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    entries = list(table(family, shapes))
    assert {entry.path for entry in entries if entry.in_model} == tree.keys()
    assert len({name for entry in entries for name in entry.names}) == sum(len(entry.names) for entry in entries)
    rng = np.random.default_rng(0)
    for entry in entries:
        theirs = [rng.normal(size=shape) for shape in entry.shapes]
        joined = entry.join(theirs)
        assert not entry.in_model or joined.shape == tree[entry.path]
        for back, sent in zip(entry.split(joined), theirs, strict=True):
            np.testing.assert_array_equal(back, sent)


def entry_of(family: str, shapes: ModelConfig, *path: str):
    return next(entry for entry in table(family, shapes) if entry.path == path)


def test_llama_names_and_heads():
    entry = entry_of("llama", OWN, "h_1", "attn", "qkv", "kernel")
    assert entry.names == tuple(f"layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    assert entry.shapes == ((12, 4), (4, 4), (4, 4))
    query, key, value = (np.arange(rows * 4).reshape(rows, 4) + start for rows, start in ((12, 0), (4, 100), (4, 200)))
    kernel = entry.join([query, key, value])  # [D, K, G+2, H]
    x = np.arange(1, 5)
    heads = np.einsum("D,DKgH->KgH", x, kernel)
    # transformers: (x @ query.T) is split into 6 heads of 2; head n has key/value head n // 3
    np.testing.assert_array_equal(heads[:, :3].reshape(6, 2), (x @ query.T).reshape(6, 2))
    np.testing.assert_array_equal(heads[:, 3], (x @ key.T).reshape(2, 2))
    np.testing.assert_array_equal(heads[:, 4], (x @ value.T).reshape(2, 2))

    entry = entry_of("llama", OWN, "h_0", "mlp", "gate_up", "kernel")
    assert entry.names == ("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")
    gate, up = np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4) + 50
    products = np.einsum("D,DgcF->gcF", x, entry.join([gate, up]))
    np.testing.assert_array_equal(products, [[x @ gate.T, x @ up.T]])
    assert prefix("qwen2") == "model."


def test_gpt2_names_and_heads():
    entry = entry_of("gpt2", GPT2, "h_0", "attn", "qkv", "kernel")
    assert (entry.names, entry.shapes) == (("h.0.attn.c_attn.weight",), ((4, 12),))
    fused, x = np.arange(48).reshape(4, 12), np.arange(1, 5)
    query, key, value = np.split(x @ fused, 3)  # as transformers' Conv1D, then split into 2 heads of 2
    heads = np.einsum("D,DKgH->KgH", x, entry.join([fused]))
    for i, part in enumerate((query, key, value)):
        np.testing.assert_array_equal(heads[:, i], part.reshape(2, 2))
    bias = entry_of("gpt2", GPT2, "h_0", "attn", "qkv", "bias").join([np.arange(12)])
    np.testing.assert_array_equal(bias, [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]])
    down = entry_of("gpt2", GPT2, "h_1", "mlp", "down", "kernel")
    assert (down.names, down.shapes) == (("h.1.mlp.c_proj.weight",), ((3, 4),))
    assert prefix("gpt2") == "transformer."
