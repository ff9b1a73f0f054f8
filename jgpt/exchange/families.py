"""The Hugging Face architectures that this GPT computes: GPT-2, Llama, Mistral, Qwen2 and Qwen3.

Beside the data path: `pretrained.py` reads a config.json with this, and `write_model.py` writes one; `tensors.py` has
the names of the weights. Keys, defaults and meanings are those of transformers' configuration_*.py and modeling_*.py.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jgpt.config.check import problems
from jgpt.config.defaults import KEYS, default_config
from jgpt.errors import UserError
from jgpt.exchange.keys import Keys, shortened
from jgpt.model.rope import RopeScaling
from jgpt.model.shapes import ModelConfig

log = logging.getLogger("jgpt")

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# The values that transformers uses for keys missing in config.json, where they are not None or False.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}
LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}


def read_config(given: Mapping[str, Any]) -> tuple[str, ConfigDict]:
    """Return the family of a config.json (a key of ARCHITECTURES), and the values of config.model for its model.

    Every value is filled in. Raises UserError where this GPT does not compute the same function.
    """
    family = _family(given)
    if given.get("quantization_config"):
        raise UserError(
            "its weights are quantized (config.json has quantization_config). Allowed: weights in fp32, fp16 or bf16."
            " Take the original model: its name is usually this one without GPTQ, AWQ, FP8 or bnb."
        )
    keys = Keys({**(LLAMA_DEFAULTS if family != "gpt2" else {}), **DEFAULTS[family], **given})
    n_rows = keys.count("vocab_size", most=int(KEYS["model.vocab_size"].high))
    full = default_config()
    full.model.update(_read_gpt2(keys) if family == "gpt2" else _read_llama(keys, family))
    if wrong := problems(full):
        raise UserError(
            f"its config.json describes a model that cannot be built: {'; '.join(wrong)}. Compare it with the original."
        )
    full.model.vocab_size = n_rows
    full.model.tie_embeddings = keys.flag("tie_word_embeddings")
    return family, full.model


def _family(given: Mapping[str, Any]) -> str:
    named = Keys(given).names("architectures")
    by_name = [family for family, architecture in ARCHITECTURES.items() if architecture in named]
    family = given.get("model_type") or (by_name[0] if by_name else None)
    # The model without its output layer, which is enough where that layer is the embedding.
    bare = [name for name in named if name.endswith("Model") and not name.endswith("LMHeadModel")]
    if not isinstance(family, str) or family not in ARCHITECTURES or (named and not by_name and not bare):
        raise UserError(
            f"its config.json names model_type {shortened(family)}, architectures {shortened(named)}. Supported are"
            " GPT-2, Llama (SmolLM2, TinyLlama), Mistral, Qwen2, Qwen2.5 and Qwen3"
            f" ({', '.join(ARCHITECTURES.values())}). Take one of these; code in a model's repository is never run."
        )
    return family


def _read_gpt2(keys: Keys) -> dict[str, Any]:
    keys.must_be("activation_function", "gelu_new", "gelu_pytorch_tanh")
    keys.must_be("scale_attn_weights", None, True)
    keys.must_be("scale_attn_by_inverse_layer_idx", None, False)
    keys.must_be("add_cross_attention", None, False)
    width, heads = keys.count("n_embd"), keys.count("n_head")
    return {
        "n_layers": keys.count("n_layer"), "n_heads": heads, "n_kv_heads": heads, "d_model": width,
        "d_head": width // heads, "d_ff": keys.count("n_inner", 4 * width),
        "context_length": keys.count("n_positions"), "position": "learned", "norm": "layernorm", "mlp": "gelu",
        "bias": True, "norm_eps": keys.number("layer_norm_epsilon"),
    }  # fmt: skip


def _read_llama(keys: Keys, family: str) -> dict[str, Any]:
    keys.must_be("hidden_act", "silu")
    width, heads, context = keys.count("hidden_size"), keys.count("num_attention_heads"), _context_length(keys, family)
    attention, mlp = keys.flag("attention_bias"), family == "llama" and keys.flag("mlp_bias")
    if mlp and not attention:
        raise keys.wrong("mlp_bias", True, "true together with attention_bias, or false")
    theta, scaling = _read_rope(keys)
    return {
        "n_layers": keys.count("num_hidden_layers"), "n_heads": heads,
        "n_kv_heads": keys.count("num_key_value_heads", heads), "d_model": width,
        "d_head": keys.count("head_dim", max(width // heads, 1)), "d_ff": keys.count("intermediate_size"),
        "context_length": context, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": attention and mlp,
        # Where the attention's output has a bias too, it must be zero: `read_weights.py` checks that.
        "qkv_bias": family == "qwen2" or (attention and family != "mistral" and not mlp),
        "qk_norm": family == "qwen3", "rope_theta": theta, "rope_scaling": scaling,
        "norm_eps": keys.number("rms_norm_eps"),
    }  # fmt: skip


def _context_length(keys: Keys, family: str) -> int:
    """Return the context length; of a model with a sliding window the length at which the window has no effect."""
    context = keys.count("max_position_embeddings")
    if family == "llama" or keys.given.get("sliding_window") is None:
        return context
    kinds = set(keys.names("layer_types"))
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise keys.wrong("layer_types", sorted(kinds), "'full_attention' and 'sliding_attention'")
    if family != "mistral":
        late = keys.count("max_window_layers", 0, 0) >= keys.count("num_hidden_layers")
        if not keys.flag("use_sliding_window") or (late and not kinds) or kinds == {"full_attention"}:
            return context
    window = keys.count("sliding_window")
    if window < context:
        log.info(
            "context: %d tokens of the model's %d: its sliding window, within which it attends to all tokens",
            window, context,
        )  # fmt: skip
    return min(window, context)


def _read_rope(keys: Keys) -> tuple[float, dict[str, Any]]:
    """Return rope_theta and the values of config.model.rope_scaling, in either spelling.

    transformers 5 writes `rope_parameters` {rope_theta, rope_type, ...}; before that, it wrote `rope_theta` and
    `rope_scaling` {rope_type or type, ...}.
    """
    both = keys.given.get("rope_scaling") or keys.given.get("rope_parameters") or {}
    if not isinstance(both, Mapping):
        raise keys.wrong("rope_scaling", both, "an object")
    outside = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    rope = Keys({**{key: keys.given[key] for key in outside if key in keys.given}, **both})
    kind = rope.given.get("rope_type") or rope.given.get("type") or "default"
    rope.must_be("partial_rotary_factor", None, 1)
    if kind not in ("default", "linear", "llama3", "yarn") or any(isinstance(x, Mapping) for x in both.values()):
        raise UserError(
            f"its config.json scales RoPE by {shortened(both)}. Allowed are the kinds default, linear, llama3 and"
            " yarn, the same in all layers. Take another model, or the original with the shorter context."
        )
    theta = rope.number("rope_theta")
    if kind == "default":
        return theta, {}
    scaling: dict[str, Any] = {"kind": kind, "factor": rope.number("factor")}
    if kind in ("llama3", "yarn"):
        context = keys.count("max_position_embeddings")
        scaling["original_context_length"] = rope.count("original_max_position_embeddings", context)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.wrong("low_freq_factor", low, f"less than high_freq_factor={high}")
        scaling |= {"low_freq_factor": low, "high_freq_factor": high}
    if kind == "yarn":
        rope.must_be("truncate", None, True)
        if rope.given.get("attention_factor") is not None:
            scaling["attention_factor"] = rope.number("attention_factor")
        elif rope.given.get("mscale") and rope.given.get("mscale_all_dim"):
            raise rope.wrong("mscale", rope.given["mscale"], "attention_factor, or neither mscale nor mscale_all_dim")
        scaling |= {"beta_fast": rope.number("beta_fast", 32), "beta_slow": rope.number("beta_slow", 1)}
    return theta, scaling


def export_family(shapes: ModelConfig) -> str:
    """Return the family that a model is exported as; raise UserError when none computes the same function."""
    c = shapes
    gpt2 = {
        "position=learned": c.position == "learned", "norm=layernorm": c.norm == "layernorm",
        "mlp=gelu": c.mlp == "gelu", "qk_norm=False": not c.qk_norm, "n_kv_heads=0": c.n_kv_heads == c.n_heads,
        "d_head=0": c.d_head * c.n_heads == c.d_model,
    }  # fmt: skip
    modern = {
        "position=rope": c.position == "rope",
        "norm=rmsnorm": c.norm == "rmsnorm",
        "mlp=swiglu": c.mlp == "swiglu",
    }
    plain = modern | {"qk_norm=False": not c.qk_norm}
    unbiased = {"bias=False": not c.bias}
    needs = {
        "gpt2": gpt2,
        # transformers refuses a Llama whose width is no multiple of its heads, even where head_dim is given.
        "llama": plain | {"qkv_bias=False": c.bias or not c.qkv_bias, "d_head=0": c.d_model % c.n_heads == 0},
        "mistral": plain | unbiased | {"qkv_bias=False": not c.qkv_bias},
        "qwen2": plain | unbiased | {"qkv_bias=True": c.qkv_bias},
        "qwen3": modern | unbiased | {"qk_norm=True": c.qk_norm},
    }
    changes = {family: [key for key, met in wanted.items() if not met] for family, wanted in needs.items()}
    nearest = min(changes, key=lambda family: len(changes[family]))
    if changes[nearest]:
        raise UserError(
            f"no Hugging Face architecture has position={c.position!r}, norm={c.norm!r}, mlp={c.mlp!r},"
            f" bias={c.bias}, qkv_bias={c.qkv_bias}, qk_norm={c.qk_norm}, n_kv_heads={c.n_kv_heads} of {c.n_heads},"
            f" d_head={c.d_head}. Allowed: GPT-2's block (learned positions, layernorm, gelu), or the modern one (rope,"
            " rmsnorm, swiglu; biases in all layers, in none, or in query, key and value; qk_norm without other"
            f" biases). The nearest is {ARCHITECTURES[nearest]}: train with"
            f" {', '.join(f'--config.model.{change}' for change in changes[nearest])}."
        )
    return nearest


def write_config(family: str, shapes: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return the config.json of a model whose `export_family` is `family`, without its token ids and its dtype."""
    c = shapes
    common = {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "vocab_size": vocab_size,
        "tie_word_embeddings": c.tie_embeddings, "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip
    if family == "gpt2":
        return common | {
            "n_positions": c.context_length, "n_embd": c.d_model, "n_layer": c.n_layers, "n_head": c.n_heads,
            "n_inner": c.d_ff, "activation_function": "gelu_new", "layer_norm_epsilon": c.norm_eps,
            "attn_pdrop": c.dropout, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
        }  # fmt: skip
    common |= {
        "hidden_size": c.d_model, "intermediate_size": c.d_ff, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads, "head_dim": c.d_head,
        "hidden_act": "silu", "max_position_embeddings": c.context_length, "rms_norm_eps": c.norm_eps,
        "attention_dropout": 0.0, **_write_rope(c.rope_theta, c.rope_scaling),
    }  # fmt: skip
    if family == "llama":
        return common | {"attention_bias": c.bias, "mlp_bias": c.bias}
    if family == "mistral":
        return common | {"sliding_window": None}
    common |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": c.n_layers}
    return common | ({"attention_bias": c.qkv_bias} if family == "qwen3" else {})


def _write_rope(theta: float, s: RopeScaling) -> dict[str, Any]:
    """Write RoPE in both spellings: that of transformers 5, and the earlier one, which other tools read."""
    scaling: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = s.original_context_length
    if s.kind == "llama3":
        scaling |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        scaling |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        scaling |= {"attention_factor": s.attention_factor} if s.attention_factor else {}
    plain = s.kind == "none"
    parameters = {"rope_theta": theta, **({"rope_type": "default"} if plain else scaling)}
    return {"rope_theta": theta, "rope_scaling": None if plain else scaling, "rope_parameters": parameters}
