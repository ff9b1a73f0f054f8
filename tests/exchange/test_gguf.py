"""GGUF files: read back with gguf's own reader, everything is there, and where llama.cpp wants it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from jgpt.data.tokenizer import Tokenizer, train_bpe, train_char
from jgpt.errors import UserError
from jgpt.exchange.gguf_file import SPLITS, check_gguf, pre_tokenizer, write_gguf
from jgpt.exchange.tensors import table
from jgpt.exchange.write_model import export_model
from jgpt.exchange.write_weights import named_tensors
from jgpt.model.parameters import abstract_params
from jgpt.model.rope import RopeScaling
from jgpt.model.shapes import ModelConfig

OWN = ModelConfig(320, 8, 2, n_heads=4, n_kv_heads=2, d_model=16, d_head=4, d_ff=24)
GPT2_LIKE = replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu", bias=True)
LLAMA3 = RopeScaling("llama3", 8.0, 32)
YARN = RopeScaling("yarn", 4.0, 32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the same ids, whoever opens it: 7 times 7"], 300)


def written(out: Path, tokenizer: Tokenizer, shapes: ModelConfig, dtype: str, **options: Any) -> tuple[Any, Any]:
    """Write a model of random parameters; return them as transformers names them, and the file's reader."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(shapes))
    family = check_gguf(out, shapes, tokenizer)
    n_rows = options.get("vocab_size", tokenizer.vocab_size)
    entries = list(table(family, replace(shapes, vocab_size=n_rows)))
    options = {"family": family, "vocab_size": n_rows, "stop_ids": (), "dtype": dtype} | options
    write_gguf(out, params, entries, shapes, tokenizer, **options)
    tensors = {name: x for entry in entries for name, x in named_tensors(params, entry, np.float32, "")}
    return tensors, gguf.GGUFReader(out)


def values(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def turned(x: np.ndarray, heads: int) -> np.ndarray:
    """Put element i of a head's first half beside element i of its second: row 2i, and row 2i + 1."""
    size = len(x) // heads
    order = [head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return x[order]


# How llama.cpp calls the tensors of a layer.
LLAMA_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj":
    "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm":
    "attn_k_norm",
}  # fmt: skip
GPT2_NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc":
    "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
WHOLE = {
    "embed_tokens": "token_embd", "wte": "token_embd", "wpe": "position_embd", "norm": "output_norm", "ln_f":
    "output_norm", "lm_head": "output",
}  # fmt: skip


def renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    layers, _, rest = stem.partition(".")
    if layers not in ("layers", "h"):
        return f"{WHOLE[stem]}.{kind}"
    layer, _, part = rest.partition(".")
    return f"blk.{layer}.{(LLAMA_NAMES if layers == 'layers' else GPT2_NAMES)[part]}.{kind}"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("architecture", "shapes"),
    [
        ("gpt2", GPT2_LIKE), ("gpt2", replace(GPT2_LIKE, bias=False)), ("llama", OWN),
        ("llama", replace(OWN, tie_embeddings=False, rope_scaling=LLAMA3)), ("llama", replace(OWN, n_heads=6)),
        ("qwen2", replace(OWN, qkv_bias=True, rope_scaling=YARN)),
        ("qwen3", replace(OWN, qk_norm=True, d_head=8, rope_scaling=RopeScaling("linear", 2.0))),
    ],
)  # fmt: skip
def test_every_tensor_and_every_number_is_in_the_file(architecture, shapes, dtype, tokenizer, tmp_path):
    tensors, reader = written(tmp_path / "m.gguf", tokenizer, shapes, dtype)
    expected = {}
    for name, x in tensors.items():
        if architecture == "gpt2" and x.ndim == 2 and name.startswith("h."):
            x = x.T  # [outputs, inputs]
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            x = turned(x, shapes.n_heads if "q_proj" in name else shapes.n_kv_heads)
        half = dtype == "fp16" and x.ndim == 2 and name != "wpe.weight"
        expected[renamed(name)] = x.astype(np.float16) if half else x
    if shapes.rope_scaling.kind == "llama3":
        expected["rope_freqs.weight"] = llama3_factors(shapes)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and np.array_equal(found[name], x), name
    keys = values(reader)
    ours = {name.removeprefix(f"{architecture}."): x for name, x in keys.items() if name.startswith(architecture)}
    wanted = {
        "block_count": 2, "context_length": 8, "embedding_length": 16, "feed_forward_length": 24,
        "attention.head_count": shapes.n_heads, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    epsilon = {"attention.layer_norm_epsilon": np.float32(1e-5)}
    if architecture != "gpt2":
        epsilon = {"attention.layer_norm_rms_epsilon": np.float32(1e-5)}
        wanted |= {
            "attention.head_count_kv": 2, "attention.key_length": shapes.d_head, "attention.value_length":
            shapes.d_head, "rope.dimension_count": shapes.d_head, "rope.freq_base": 10_000.0,
        }  # fmt: skip
    if shapes.rope_scaling.kind in ("linear", "yarn"):
        wanted |= {"rope.scaling.type": shapes.rope_scaling.kind, "rope.scaling.factor": shapes.rope_scaling.factor}
    if shapes.rope_scaling.kind == "yarn":
        wanted |= {"rope.scaling.original_context_length": 32}
        wanted |= {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
    assert ours == wanted | epsilon
    assert keys["general.architecture"] == architecture and keys["general.file_type"] == (dtype == "fp16")


def llama3_factors(shapes: ModelConfig) -> np.ndarray:
    """Return the factors as llama.cpp's conversion/llama.py has them, in fp32."""
    s, factors = shapes.rope_scaling, []
    for i in range(0, shapes.d_head, 2):
        wavelength = 2 * np.pi * shapes.rope_theta ** (i / shapes.d_head)
        smooth = (s.original_context_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        factors.append(1 / ((1 - np.clip(smooth, 0, 1)) / s.factor + np.clip(smooth, 0, 1)))
    return np.array(factors, np.float32)


def test_the_tokenizer_is_in_the_file(tmp_path):
    trained = json.loads(train_bpe(["the same ids, whoever opens it"], 290).tokenizer_json)
    special, n = trained["added_tokens"][0], len(trained["model"]["vocab"])
    trained["added_tokens"] += [
        special | {"id": n, "content": "<|im_end|>"},
        special | {"id": n + 1, "content": "<tool>", "special": False},
    ]
    tokenizer = Tokenizer(json.dumps(trained), {"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"})
    stops = (n, tokenizer.eot_id)
    _, reader = written(tmp_path / "m.gguf", tokenizer, OWN, "fp32", vocab_size=n + 3, stop_ids=stops)
    keys = {name.removeprefix("tokenizer."): x for name, x in values(reader).items() if name.startswith("tokenizer.")}
    tokens = [tokenizer.backend.id_to_token(i) for i in range(n + 2)]
    assert keys["ggml.tokens"] == [*tokens, f"[PAD{n + 2}]"]  # a row of the embedding without a token
    types = keys["ggml.token_type"]
    assert (types[tokenizer.eot_id], *types[n:]) == (3, 3, 4, 5) and types.count(1) == n - 1
    assert keys["ggml.merges"] == [" ".join(merge) for merge in trained["model"]["merges"]]
    assert (keys["ggml.model"], keys["ggml.pre"], keys["ggml.add_bos_token"]) == ("gpt2", "gpt-2", False)
    assert (keys["ggml.eos_token_id"], keys["ggml.eot_token_id"]) == (tokenizer.eot_id, n)
    assert keys["chat_template"] == "{{ messages }}"


def bpe(steps: list[Any], normalizer: Any = None) -> Tokenizer:
    """Return a byte-level tokenizer without merges that cuts text as `steps` say."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return Tokenizer(backend.to_str(), {"eos_token": "<|endoftext|>"})


def test_tokenizers_are_told_apart_and_what_llama_cpp_lacks_is_refused(tokenizer):
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert pre_tokenizer(tokenizer) == pre_tokenizer(bpe([plain])) == "gpt-2"
    assert pre_tokenizer(bpe([digits, plain])) == "smollm"
    for pattern, name in SPLITS.items():
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert pre_tokenizer(bpe([split, bytes_only], normalizers.NFC() if name == "qwen2" else None)) == name
    for other in (
        train_char(["abc"]),
        bpe([plain], normalizers.Lowercase()),
        bpe([pre_tokenizers.ByteLevel(add_prefix_space=True)]),
        bpe([pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated"), bytes_only]),
        bpe([pre_tokenizers.Whitespace(), plain]),
    ):
        with pytest.raises(UserError, match="llama.cpp has no tokenizer like this one"):
            pre_tokenizer(other)


@pytest.mark.parametrize(
    ("shapes", "part"),
    [
        (replace(OWN, bias=True), "bias=True in a llama model"),
        (replace(OWN, qk_norm=True, qkv_bias=True), "qkv_bias=True beside qk_norm=True"),
        (replace(OWN, qkv_bias=True, rope_scaling=LLAMA3), "rope_scaling.kind='llama3' in a qwen2 model"),
        (replace(OWN, rope_scaling=replace(YARN, attention_factor=1.5)), "rope_scaling.kind='yarn' with an attention"),
        (replace(OWN, norm="layernorm"), "no Hugging Face architecture"),
    ],
)
def test_what_is_not_certain_is_refused_by_name(shapes, part, tokenizer, tmp_path):
    with pytest.raises(UserError, match=part):
        check_gguf(tmp_path / "m.gguf", shapes, tokenizer)
    for name in ("m.bin", "missing/m.gguf"):
        with pytest.raises(UserError, match="gguf"):
            check_gguf(tmp_path / name, OWN, tokenizer)


def test_the_command_writes_a_file_that_is_there_whole_or_not_at_all(command, trained, tokenizer, tmp_path):
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), abstract_params(OWN))
    model, out = tmp_path / "model", tmp_path / "with a space.gguf"
    export_model(model, params, OWN, tokenizer, vocab_size=OWN.vocab_size, stop_ids=(), dtype="bf16")
    result = command("convert", "gguf", str(model), str(out))
    assert result.code == 0 and f"{out} is written: llama, fp16, " in result.out, result.err
    assert f"llama-cli -m '{out}' " in result.out
    assert all(np.all(tensor.data == 0.5) for tensor in gguf.GGUFReader(out).tensors)
    before = out.read_bytes()
    for arguments, part in (
        ([str(model), str(out)], "exists"),
        ([str(model), str(tmp_path / "b.gguf"), "--dtype=bf16"], "Take --dtype=fp16"),
        ([str(trained), str(tmp_path / "b.gguf")], "tokenizer.kind='bpe'"),  # it has characters, not bytes
    ):
        refused = command("convert", "gguf", *arguments)
        assert refused.code == 2 and part in refused.err and "Traceback" not in refused.err
    assert out.read_bytes() == before and [path.name for path in tmp_path.glob("*gguf*")] == [out.name]
