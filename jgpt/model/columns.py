"""Group the columns of a model by the devices that share it (tensor parallelism).

In the data path: beside `gpt.py`. The model stays the same, but its columns get another order, in which each device's
part is contiguous. `parallel/rules.py` says which axis is then split.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.model.parameters import path_names
from jgpt.model.shapes import ModelConfig


def for_devices(config: ModelConfig, n: int) -> ModelConfig:
    """Return the config of the same model with its columns grouped for `n` devices.

    Where the key/value heads do not divide by `n`, each is repeated, and its query heads are divided among the copies.
    Where the query heads do not divide either, every device computes all of attention. An MLP whose width does not
    divide by `n` is computed whole on every device too.

    >>> config = ModelConfig(64, 8, 1, n_heads=8, n_kv_heads=1, d_model=64, d_head=8, d_ff=64)
    >>> shared = for_devices(config, 2)
    >>> shared.n_kv_heads, shared.mlp_groups
    (2, 2)
    """
    copies = n // math.gcd(config.n_kv_heads, n)
    group = config.n_heads // config.n_kv_heads
    n_kv_heads = config.n_kv_heads if group % copies else config.n_kv_heads * copies
    return replace(config, n_kv_heads=n_kv_heads, mlp_groups=n if config.d_ff % n == 0 else 1)


def regroup(path: tuple[str, ...], array: Any, config: ModelConfig) -> Any:
    """Rearrange one parameter of the plain model, or of its adapters, for `config`, which `for_devices` made.

    Most parameters are returned unchanged. `array` is of numpy or JAX; `path` is its keys in the tree, as ("h_0",
    "attn", "qkv", "kernel").
    """
    layer, leaf = path[-2], path[-1]
    if leaf == "a":  # an adapter's inputs have the order of the plain model
        return array
    join = np.concatenate if isinstance(array, np.ndarray) else jnp.concatenate
    if layer == "qkv" and array.shape[-3] != config.n_kv_heads:  # [(D,) K, G+2, H]
        *lead, k, per_head, h = array.shape
        copies = config.n_kv_heads // k
        queries = array[..., :-2, :].reshape(*lead, config.n_kv_heads, (per_head - 2) // copies, h)
        return join([queries, array[..., -2:, :].repeat(copies, axis=-3)], axis=-2)
    if layer == "gate_up" and array.shape[-3] != config.mlp_groups:  # [(D,) 1, 2, F]
        *lead, _, _, f = array.shape
        grouped = array.reshape(*lead, 2, config.mlp_groups, f // config.mlp_groups)
        return grouped.swapaxes(-3, -2)
    return array


def regroup_tree(params: Any, config: ModelConfig) -> Any:
    """Rearrange all parameters of the plain model, or all adapters to it, for `config`, which `for_devices` made."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: regroup(path_names(path), leaf, config), params)
