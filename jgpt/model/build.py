"""From a config to a model: the derived shapes, and what they cost.

In the data path: between the tokenizer, which fixes the vocabulary, and the GPT.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jgpt.config import UserError
from jgpt.model.gpt import GPT, ModelConfig
from jgpt.model.lora import LoRA, init_adapters
from jgpt.model.rope import RopeScaling


def model_config(model: ConfigDict, n_ids: int) -> ModelConfig:
    """Fill in the derived values (the zeros of the config); `n_ids` is the tokenizer's vocabulary.

    Raises UserError when the model's vocabulary is smaller than the tokenizer's.

    >>> from jgpt.config import default_config
    >>> filled = model_config(default_config().model, n_ids=1000)
    >>> filled.vocab_size, filled.d_head, filled.d_ff
    (1024, 64, 1024)
    """
    if 0 < model.vocab_size < n_ids:
        raise UserError(
            f"model.vocab_size={model.vocab_size}, and the tokenizer has {n_ids} ids: the model must have a row for"
            f" each. Allowed: at least {n_ids}, or 0 for the tokenizer's own number. Set --config.model.vocab_size=0."
        )
    multiple = model.vocab_multiple_of
    return ModelConfig(
        vocab_size=model.vocab_size or math.ceil(n_ids / multiple) * multiple,
        context_length=model.context_length,
        n_layers=model.n_layers,
        n_heads=model.n_heads,
        n_kv_heads=model.n_kv_heads or model.n_heads,
        d_model=model.d_model,
        d_head=model.d_head or model.d_model // model.n_heads,
        d_ff=model.d_ff or (4 * model.d_model if model.mlp == "gelu" else math.ceil(8 * model.d_model / 3 / 64) * 64),
        dropout=model.dropout,
        position=model.position,
        norm=model.norm,
        mlp=model.mlp,
        bias=model.bias,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        tie_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        rope_scaling=RopeScaling(**model.rope_scaling),
        norm_eps=model.norm_eps,
    )


def lora_config(lora: ConfigDict) -> LoRA | None:
    """Return what `config.lora` asks for; None where its rank is 0."""
    targets = tuple(target.strip() for target in lora.targets.split(","))
    return LoRA(lora.rank, lora.alpha, lora.dropout, targets) if lora.rank else None


def abstract_params(config: ModelConfig) -> Any:
    """Return the parameter tree as shapes and dtypes, without making it."""
    model = GPT(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def abstract_stored(config: ModelConfig, matrices: Any) -> Any:
    """Return the same tree as it is loaded: arrays of more than one axis in the dtype `matrices`, vectors in fp32."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, matrices if x.ndim > 1 else jnp.float32), abstract_params(config)
    )


def abstract_adapters(config: ModelConfig, lora: LoRA) -> Any:
    """Return the tree of LoRA's adapters as shapes and dtypes, without making it."""
    return jax.eval_shape(lambda: init_adapters(GPT(config, lora=lora), jax.random.key(0)))


def count_parameters(config: ModelConfig) -> int:
    """Count the parameters, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def flops_per_token(config: ModelConfig, adapters: int = 0) -> float:
    """Return the model's floating-point operations for one token of training: forward, and backward at twice that.

    6 for every parameter that takes part in a matrix product, and 12 L N H T for attention's two products over
    all T positions (Chowdhery et al., arXiv 2204.02311, appendix B). Recomputation (remat) does not count, nor do
    skipped halves of causal attention: the number says what the model needs, not what a program does. With so many
    `adapters` (LoRA's parameters) the others are frozen, and have no gradient of their own: 4 for each.
    """
    lookups = config.context_length * config.d_model if config.position == "learned" else 0
    if not config.tie_embeddings:
        lookups += config.vocab_size * config.d_model
    attention = 12 * config.n_layers * config.n_heads * config.d_head * config.context_length
    return (4.0 if adapters else 6.0) * (count_parameters(config) - lookups) + 6.0 * adapters + attention
