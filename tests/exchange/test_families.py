"""config.json to the values of config.model and back; what this GPT does not compute is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from jgpt.errors import UserError
from jgpt.exchange.families import ARCHITECTURES, export_family, read_config, write_config
from jgpt.model.rope import RopeScaling
from jgpt.model.shapes import ModelConfig, model_config

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
    "n_head": 12, "n_positions": 1024, "n_ctx": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
OWN = ModelConfig(96, 64, 2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_ff=48)
GPT2_LIKE = replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu")


def shapes_of(config: dict[str, Any]) -> ModelConfig:
    return model_config(read_config(config)[1], 0)


def test_gpt2():
    family, model = read_config(GPT2)
    assert family == "gpt2"
    assert model_config(model, 0) == ModelConfig(
        50257, 1024, 12, n_heads=12, n_kv_heads=12, d_model=768, d_head=64, d_ff=3072, position="learned",
        norm="layernorm", mlp="gelu", bias=True, tie_embeddings=True,
    )  # fmt: skip


def test_llama_and_what_is_left_out():
    wanted = ModelConfig(96, 64, 2, n_heads=6, n_kv_heads=2, d_model=24, d_head=4, d_ff=40, tie_embeddings=False)
    assert shapes_of(LLAMA) == wanted
    assert shapes_of(LLAMA | {"head_dim": None, "rope_scaling": None, "attention_bias": False}) == wanted
    assert shapes_of({key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}).n_kv_heads == 6
    assert shapes_of(LLAMA | {"head_dim": 10}).d_head == 10
    assert shapes_of(LLAMA | {"tie_word_embeddings": True}).tie_embeddings
    assert shapes_of({key: LLAMA[key] for key in LLAMA if key != "rms_norm_eps"}).norm_eps == 1e-6
    assert shapes_of({key: LLAMA[key] for key in LLAMA if key != "model_type"}) == wanted
    assert shapes_of(LLAMA | {"architectures": ["LlamaModel"]}) == wanted


@pytest.mark.parametrize(
    ("model_type", "more", "bias", "qkv_bias", "qk_norm", "d_head"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, True, False, False, 4),
        ("llama", {"attention_bias": True}, False, True, False, 4),
        ("mistral", {"attention_bias": True}, False, False, False, 4),  # it has no such key
        ("qwen2", {}, False, True, False, 4),
        ("qwen3", {}, False, False, True, 128),
        ("qwen3", {"attention_bias": True, "head_dim": 16}, False, True, True, 16),
    ],
)
def test_what_differs_by_family(model_type, more, bias, qkv_bias, qk_norm, d_head):
    config = LLAMA | {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]], **more}
    shapes = shapes_of(config)
    assert (shapes.bias, shapes.qkv_bias, shapes.qk_norm, shapes.d_head) == (bias, qkv_bias, qk_norm, d_head)


@pytest.mark.parametrize(
    ("model_type", "more", "context"),
    [
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": None}, 64),
        ("mistral", {"sliding_window": 999}, 64),
        ("mistral", {"max_position_embeddings": 9999}, 4096),  # transformers' own default
        ("llama", {"sliding_window": 32}, 64),  # it has no such key
        ("qwen2", {"sliding_window": 32}, 64),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 0}, 64),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, 64),
        ("qwen3", {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 64),
        (
            "qwen3",
            {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            32,
        ),
    ],
)
def test_the_context_ends_where_a_window_would_begin_to_slide(model_type, more, context, caplog):
    caplog.set_level("INFO", "jgpt")
    config = LLAMA | {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]], **more}
    assert shapes_of(config).context_length == context
    said = f"context: {context} tokens of the model's {config['max_position_embeddings']}"
    assert (said in caplog.text) == (context < config["max_position_embeddings"])


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 1e4, RopeScaling()),
        ({"rope_theta": 500_000}, 5e5, RopeScaling()),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, RopeScaling()),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}}, 7.0, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, 1e4, RopeScaling("linear", 2.0)),
        ({"rope_scaling": {"type": "yarn", **YARN}}, 1e4, RopeScaling("yarn", 4.0, 16)),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 1e4, RopeScaling("yarn", 2.0, 64)),
        (
            {"rope_parameters": {"rope_type": "yarn", "attention_factor": 1.2, "beta_slow": 2, **YARN}},
            1e4, RopeScaling("yarn", 4.0, 16, beta_slow=2.0, attention_factor=1.2),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 8.0, **YARN}},
            1e4, RopeScaling("llama3", 4.0, 16, 1.0, 8.0),
        ),
    ],
)  # fmt: skip
def test_both_spellings_of_rope(rope, theta, scaling):
    shapes = shapes_of(LLAMA | rope)
    assert (shapes.rope_theta, shapes.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, ["'gemma2'", "Supported are GPT-2, Llama"]),
        ({}, ["model_type None", "Qwen3ForCausalLM"]),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, ["quantized", "fp32, fp16 or bf16", "GPTQ"]),
        (LLAMA | {"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        (LLAMA | {"mlp_bias": True}, ["mlp_bias=True", "attention_bias"]),
        (LLAMA | {"hidden_size": None}, ["no hidden_size", "a whole number"]),
        (LLAMA | {"hidden_size": "24"}, ["hidden_size='24'", "a whole number"]),
        (LLAMA | {"num_key_value_heads": 4}, ["model.n_kv_heads=4 does not divide model.n_heads=6"]),
        (LLAMA | {"head_dim": 5}, ["a head is 5 wide"]),
        (LLAMA | {"rms_norm_eps": 0}, ["rms_norm_eps=0", "a number above 0"]),
        (LLAMA | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "linear, llama3 and yarn"]),
        (LLAMA | {"rope_scaling": {"type": "longrope"}}, ["longrope", "linear, llama3 and yarn"]),
        (LLAMA | {"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "an object"]),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["the same in all layers"]),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, ["no factor"]),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["model.rope_scaling.factor=0.5"]),
        (LLAMA | {"rope_scaling": {"type": "yarn", "truncate": False, **YARN}}, ["truncate=False"]),
        (LLAMA | {"rope_scaling": {"type": "yarn", "mscale": 1, "mscale_all_dim": 0.7, **YARN}}, ["mscale=1"]),
        (
            LLAMA | {"rope_scaling": {"type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0, **YARN}},
            ["low_freq_factor=4.0", "less than high_freq_factor=4.0"],
        ),
        (
            LLAMA | {"model_type": "qwen2", "layer_types": ["chunked_attention"]},
            ["layer_types=['chunked_attention']", "'full_attention'"],
        ),
        (GPT2 | {"activation_function": "relu"}, ["activation_function='relu'", "'gelu_new' or 'gelu_pytorch_tanh'"]),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx=True", "False"]),
        (GPT2 | {"scale_attn_weights": False}, ["scale_attn_weights=False"]),
        (GPT2 | {"add_cross_attention": True}, ["add_cross_attention=True"]),
        (LLAMA | {"architectures": 5}, ["architectures=5", "a list of texts"]),
        (LLAMA | {"architectures": [["LlamaForCausalLM"]]}, ["a list of texts"]),
        (LLAMA | {"model_type": ["llama"]}, ["model_type ['llama']", "Supported are"]),
        (LLAMA | {"model_type": "qwen2", "sliding_window": 8, "layer_types": 5}, ["layer_types=5", "a list of texts"]),
        (LLAMA | {"num_hidden_layers": 10**9}, ["model.n_layers=1000000000: it must be 1 to 1,000"]),
        (LLAMA | {"num_attention_heads": 2**31 - 1}, ["model.n_heads=2147483647: it must be 1 to 4,096"]),
        (GPT2 | {"n_layer": 2**63}, ["n_layer=9223372036854775808", "1 to 2,147,483,647"]),
        (LLAMA | {"vocab_size": 2**30}, ["vocab_size=1073741824", "1 to 16,777,216"]),
        (LLAMA | {"rms_norm_eps": 10**400}, ["rms_norm_eps=1000", "a number above 0"]),
        (LLAMA | {"hidden_size": "x" * 5000}, ["hidden_size='xxx", "xxx...", "a whole number"]),
        (
            LLAMA | {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", **YARN}},
            ["the logarithm of model.rope_theta=1"],
        ),
    ],
)  # fmt: skip
def test_what_is_refused(config, parts):
    with pytest.raises(UserError) as error:
        read_config(config)
    for part in parts:
        assert part in str(error.value)


HOMES = {
    "gpt2": [GPT2_LIKE, replace(GPT2_LIKE, bias=True), replace(GPT2_LIKE, qkv_bias=True, tie_embeddings=False)],
    "llama": [
        OWN, replace(OWN, bias=True), replace(OWN, bias=True, qkv_bias=True), replace(OWN, d_head=10),
        replace(OWN, rope_scaling=RopeScaling("llama3", 8.0, 32)), replace(OWN, tie_embeddings=False),
    ],
    "mistral": [replace(OWN, n_heads=6)],  # transformers refuses a Llama of 6 heads in a width of 32
    "qwen2": [replace(OWN, qkv_bias=True), replace(OWN, qkv_bias=True, n_heads=6)],
    "qwen3": [
        replace(OWN, qk_norm=True), replace(OWN, qk_norm=True, qkv_bias=True),
        replace(OWN, qk_norm=True, rope_scaling=RopeScaling("yarn", 8.0, 32, beta_fast=16.0, attention_factor=1.5)),
        replace(OWN, qk_norm=True, rope_scaling=RopeScaling("linear", 8.0)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("family", "shapes"), [(family, one) for family, some in HOMES.items() for one in some])
def test_a_model_is_the_same_after_writing_and_reading_its_config_json(family, shapes):
    assert export_family(shapes) == family
    config = json.loads(json.dumps(write_config(family, shapes, shapes.vocab_size)))
    read_family, model = read_config(config)
    biases = (
        {"bias": True, "qkv_bias": False} if family == "gpt2" else {"qkv_bias": shapes.qkv_bias and not shapes.bias}
    )
    assert read_family == family and model_config(model, 0) == replace(shapes, **biases)


@pytest.mark.parametrize(
    ("shapes", "change"),
    [
        (replace(OWN, norm="layernorm"), "LlamaForCausalLM: train with --config.model.norm=rmsnorm."),
        (replace(OWN, mlp="gelu"), "LlamaForCausalLM: train with --config.model.mlp=swiglu."),
        (replace(GPT2_LIKE, position="rope"), "GPT2LMHeadModel: train with --config.model.position=learned."),
        (replace(GPT2_LIKE, n_kv_heads=2), "GPT2LMHeadModel: train with --config.model.n_kv_heads=0."),
        (replace(GPT2_LIKE, d_head=4), "GPT2LMHeadModel: train with --config.model.d_head=0."),
        (replace(OWN, bias=True, qk_norm=True), "LlamaForCausalLM: train with --config.model.qk_norm=False."),
        (replace(OWN, bias=True, n_heads=6), "LlamaForCausalLM: train with --config.model.d_head=0."),
    ],
)
def test_a_model_without_an_architecture_is_refused_with_the_nearest(shapes, change):
    with pytest.raises(UserError, match="no Hugging Face architecture has") as error:
        export_family(shapes)
    assert change in str(error.value)
