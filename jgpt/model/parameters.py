"""A model's parameters: their names, shapes and number, and the floating-point operations that they cost.

Beside the data path: loading, planning and reports call these; nothing is allocated.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.errors import UserError
from jgpt.model.gpt import GPT
from jgpt.model.lora import LoRA, init_adapters
from jgpt.model.shapes import ModelConfig

# (a parameter's keys in the tree, its values) -> the leaf to keep: where it belongs, such as on a device
PlaceParam = Callable[[tuple[str, ...], np.ndarray], Any]


def path_names(path: Any) -> tuple[str, ...]:
    """Return the keys of a path that JAX gives, as ("h_0", "attn", "qkv", "kernel")."""
    return tuple(key.key for key in path)


def abstract_params(config: ModelConfig) -> Any:
    """Return the parameter tree as shapes and dtypes (jax.ShapeDtypeStruct)."""
    model = GPT(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def abstract_stored(config: ModelConfig, matrices: Any) -> Any:
    """Return the shapes and dtypes of loaded parameters: `matrices` for arrays of several axes, fp32 for vectors."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, matrices if x.ndim > 1 else jnp.float32), abstract_params(config)
    )


def abstract_adapters(config: ModelConfig, lora: LoRA) -> Any:
    """Return the tree of LoRA's adapters as shapes and dtypes (jax.ShapeDtypeStruct)."""
    return jax.eval_shape(lambda: init_adapters(GPT(config, lora=lora), jax.random.key(0)))


def count_parameters(config: ModelConfig) -> int:
    """Count the parameters, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def count_adapters(config: ModelConfig, lora: LoRA | None) -> int:
    """Count the parameters of LoRA's adapters; raise UserError where the model has none of their layers."""
    if lora is None:
        return 0
    there = ("qkv", "proj", "gate_up" if config.mlp == "swiglu" else "up", "down")
    if not set(there) & set(lora.targets):
        raise UserError(
            f"lora.targets={','.join(lora.targets)!r}, and this model has none of these layers. Allowed:"
            f" {', '.join(there)}. Set --config.lora.targets={','.join(there)}."
        )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_adapters(config, lora)))


def flops_per_token(config: ModelConfig, adapters: int = 0) -> float:
    """Return the model's floating-point operations for one token of training: forward, and backward at twice that.

    That is 6 for every parameter in a matrix product, and 12 L N H T for attention's two products over all T positions
    (Chowdhery et al., arXiv 2204.02311, appendix B). The number says what the model needs, not what a program does: it
    leaves out what remat computes again, and counts the masked pairs of causal attention too. `adapters` is the number
    of LoRA's parameters. With them the other parameters are frozen and have no gradient: 4 for each.
    """
    lookups = config.context_length * config.d_model if config.position == "learned" else 0
    if not config.tie_embeddings:
        lookups += config.vocab_size * config.d_model
    attention = 12 * config.n_layers * config.n_heads * config.d_head * config.context_length
    return (4.0 if adapters else 6.0) * (count_parameters(config) - lookups) + 6.0 * adapters + attention
