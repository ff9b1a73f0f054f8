"""The same function as transformers' PyTorch models, both ways, and PEFT's; needs `pip install -e '.[peers]'`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.data.tokenizer import train_bpe
from jgpt.exchange.pretrained import open_pretrained
from jgpt.exchange.write_adapter import adapter_config, adapter_tensors, write_adapter
from jgpt.exchange.write_model import export_model
from jgpt.loading.source import load_params, open_source
from jgpt.model.gpt import GPT, unembedding
from jgpt.model.lora import LoRA
from jgpt.model.parameters import abstract_adapters, abstract_params
from jgpt.model.rope import RopeScaling, frequencies
from jgpt.model.shapes import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

V, LENGTH = 307, 29
LLAMA = {
    "vocab_size": V, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "eos_token_id": 5, "bos_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 40, "eos_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 3.0, "original_max_position_embeddings": 16}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied, own MLP width": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 50}),
    "llama": ("llama", LLAMA),
    "llama tied, wide heads, llama3": (
        "llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 10, "rope_parameters": LLAMA3}
    ),
    "llama biases, linear": (
        "llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("mistral", LLAMA | {"head_dim": 8, "sliding_window": None, "num_attention_heads": 8}),
    "mistral with a window, odd heads": (
        "mistral", LLAMA | {"head_dim": 6, "sliding_window": 31, "num_attention_heads": 8}
    ),
    "qwen2 tied": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", LLAMA | {"rope_parameters": YARN}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3 untied, window, yarn": (
        "qwen3",
        LLAMA | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}
        | {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}},
    ),
}  # fmt: skip


def make(directory: Path, kind: str, values: dict[str, Any]) -> Any:
    """Save a random model of transformers, its biases and norms random too, and return it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model


def ours(directory: Path) -> tuple[GPT, Any]:
    pretrained = open_pretrained(directory)
    params = pretrained.load_params(np.float32, lambda path, array: array.copy())
    return GPT(pretrained.shapes), params


def our_logits(model: GPT, params: Any, ids: np.ndarray) -> np.ndarray:
    hidden = jax.jit(model.apply)({"params": params}, jnp.asarray(ids, jnp.int32)).hidden
    return np.asarray(hidden @ unembedding(params).T)


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def random_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (3, LENGTH))


def same_logits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.array_equal(a.argmax(-1), b.argmax(-1))


def same_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_in_and_goes_out_as_the_same_function(name, tmp_path):
    theirs = make(tmp_path / "theirs", *MODELS[name])
    model, params = ours(tmp_path / "theirs")
    ids = random_ids()
    expected = their_logits(theirs, ids)
    same_logits(our_logits(model, params, ids), expected)

    tokenizer = train_bpe(["some text"], 300)
    export_model(tmp_path / "ours", params, model.config, tokenizer, vocab_size=V, stop_ids=(5, 7), dtype="fp32")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=False)
    np.testing.assert_allclose(their_logits(reloaded, ids), expected, atol=1e-6)
    assert reloaded.generation_config.eos_token_id == [5, 7, tokenizer.eot_id]
    again, params_again = ours(tmp_path / "ours")
    assert again == model
    same_trees(params_again, params)


OWN = ModelConfig(
    vocab_size=320, context_length=40, n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_ff=48,
)  # fmt: skip
GPT2_LIKE = replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu")


@pytest.mark.parametrize(
    "shapes",
    [
        OWN, replace(OWN, bias=True, tie_embeddings=False), replace(OWN, qkv_bias=True), replace(OWN, qk_norm=True),
        replace(OWN, qk_norm=True, qkv_bias=True), replace(OWN, n_heads=6), replace(OWN, qkv_bias=True, d_head=10),
        GPT2_LIKE, replace(GPT2_LIKE, bias=True, tie_embeddings=False), replace(GPT2_LIKE, qkv_bias=True),
    ],
)  # fmt: skip
def test_what_jgpt_trains_is_the_same_model_in_transformers(shapes, tmp_path):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), abstract_params(shapes))
    tokenizer = train_bpe(["some text"], 300)
    n_ids = tokenizer.vocab_size
    export_model(tmp_path / "out", params, shapes, tokenizer, vocab_size=n_ids, stop_ids=(), dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = rng.integers(0, n_ids, (2, LENGTH))
    same_logits(our_logits(GPT(shapes), params, ids)[..., :n_ids], their_logits(theirs, ids))
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == tokenizer.eot_id
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("some more text", add_special_tokens=False).input_ids == tokenizer.encode("some more text").tolist()


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "linear", "factor": 2.5}, RopeScaling("linear", 2.5)),
        (LLAMA3, RopeScaling("llama3", 4.0, 16)),
        (LLAMA3 | {"high_freq_factor": 8.0, "factor": 32.0}, RopeScaling("llama3", 32.0, 16, high_freq_factor=8.0)),
        (YARN, RopeScaling("yarn", 3.0, 16)),
        (YARN | {"factor": 1.0}, RopeScaling("yarn", 1.0, 16)),
        (YARN | {"original_max_position_embeddings": 4096}, RopeScaling("yarn", 3.0, 4096)),
        (YARN | {"original_max_position_embeddings": 1}, RopeScaling("yarn", 3.0, 1)),
        (YARN | {"beta_fast": 4.0, "beta_slow": 2.0}, RopeScaling("yarn", 3.0, 16, beta_fast=4.0, beta_slow=2.0)),
        (YARN | {"attention_factor": 1.7}, RopeScaling("yarn", 3.0, 16, attention_factor=1.7)),
    ],
)
def test_stretched_frequencies(parameters, scaling):
    theta = parameters.get("rope_theta", 10_000.0)
    config = transformers.LlamaConfig(**LLAMA | {"head_dim": 16, "rope_parameters": {"rope_theta": theta} | parameters})
    radians, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    found, found_factor = frequencies(16, theta, scaling)
    np.testing.assert_allclose(found, radians.numpy(), rtol=2e-6)
    assert found_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "qkv,proj,gate_up,up,down"), ("llama tied, wide heads, llama3", "qkv,down"),
        ("mistral", "qkv,proj,gate_up,up,down"), ("qwen3", "proj,gate_up"), ("gpt2", "qkv,proj,gate_up,up,down"),
        ("gpt2 untied, own MLP width", "proj"), ("gpt2", "down"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_are_the_same_function_in_peft(name, targets, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = make(tmp_path / "base", *MODELS[name])
    model, params = ours(tmp_path / "base")
    lora, rng, ids = LoRA(3, 7.5, 0.1, tuple(targets.split(","))), np.random.default_rng(1), random_ids()
    shapes, family = model.config, MODELS[name][0]
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), abstract_adapters(shapes, lora))
    hidden = jax.jit(GPT(shapes, lora=lora).apply)({"params": params, "lora": adapters}, jnp.asarray(ids, jnp.int32))
    expected = np.asarray(hidden.hidden @ unembedding(params).T)
    assert np.abs(expected - their_logits(theirs, ids)).max() > 0.1

    pairs = dict(adapter_tensors(adapters, shapes, family))
    config = adapter_config(list(pairs), lora, family, str(tmp_path / "base"))
    write_adapter(tmp_path / "out", pairs, config, "a card", train_bpe(["some text"], 300), 48, "fp32")
    same_logits(their_logits(peft.PeftModel.from_pretrained(theirs, tmp_path / "out"), ids), expected)
    whole = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").merge_and_unload()
    same_logits(their_logits(whole, ids), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"use_rslora": True, "init_lora_weights": "gaussian"}], ids=["lora", "rslora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_are_the_same_function_here(name, how, tmp_path):
    """As PEFT trains them: a lora_A of its own for each layer, and here not for all of query, key and value."""
    peft = pytest.importorskip("peft")
    kind, values = MODELS[name]
    make(tmp_path / "base", kind, values)
    train_bpe(["some text"], 300).save(tmp_path / "base", 48)
    layers = ["c_attn", "mlp.c_proj"] if kind == "gpt2" else ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=layers, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **how
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for part, parameter in theirs.named_parameters():
            if "lora_B" in part:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    ids, plain = random_ids(), ours(tmp_path / "base")
    expected = their_logits(theirs, ids)
    assert np.abs(expected - our_logits(*plain, ids)).max() > 0.1
    loaded = load_params(open_source(str(tmp_path / "adapter")), np.float32, lambda path, array: array)
    same_logits(our_logits(plain[0], loaded, ids), expected)


def test_shards(tmp_path):
    theirs = make(tmp_path / "theirs", "llama", LLAMA)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    model, params = ours(tmp_path / "theirs")
    same_trees(ours(tmp_path / "sharded")[1], params)
    export_model(
        tmp_path / "ours", params, model.config, train_bpe(["x"], 300), vocab_size=V, stop_ids=(), dtype="fp32",
        shard_bytes=20_000,
    )  # fmt: skip
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert np.array_equal(their_logits(reloaded, random_ids()), their_logits(theirs, random_ids()))


def test_the_older_spelling_of_rope(tmp_path):
    make(tmp_path / "new", "llama", LLAMA | {"rope_parameters": YARN})
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    yarn = config.pop("rope_parameters")
    config |= {"rope_theta": yarn.pop("rope_theta"), "rope_scaling": yarn | {"type": yarn.pop("rope_type")}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert open_pretrained(tmp_path / "old").model == open_pretrained(tmp_path / "new").model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    same_logits(our_logits(*ours(tmp_path / "old"), random_ids()), their_logits(theirs, random_ids()))
