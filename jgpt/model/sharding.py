"""One model over several devices: which axis of each parameter is split (tensor parallelism).

In the data path: beside `gpt.py`; decoding and LoRA on a model too large for one device place its parameters by this.

As in Megatron-LM (Shoeybi et al., arXiv 1909.08053): attention is split by heads, the MLP by columns then rows, the
embeddings by vocabulary; every device holds the whole residual stream, and the compiler adds up two partial sums a
block. What does not divide stays whole on every device.
"""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.model.gpt import ModelConfig

AXIS = "model"


def device_mesh(devices: Any) -> Mesh:
    """Return the mesh of the devices that share one model."""
    return Mesh(np.array(devices), (AXIS,))


def for_devices(config: ModelConfig, n: int) -> ModelConfig:
    """Return `config` as `n` devices share it: the same model, with its columns grouped by device.

    Key/value heads are repeated where they do not divide, and the query heads that share one are divided among its
    copies. Where that does not come out even, attention stays whole on every device; so does an odd MLP.

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
    """Rearrange one parameter of the plain model for `config`, which `for_devices` made; the others pass through.

    `array` is numpy's or JAX's; `path` is its keys in the tree, as ("h_0", "attn", "qkv", "kernel").
    """
    layer, leaf = path[-2], path[-1]
    if leaf == "a":  # an adapter's inputs are what they are in the plain model
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


def partition_spec(path: tuple[str, ...], shape: tuple[int, ...], config: ModelConfig, n: int) -> PartitionSpec:
    """Say how a parameter of the tree is split over `n` devices; `path` is its keys, as ("h_0", "attn", "qkv", "bias").

    `config` is what `for_devices` made. Norms and adapters are whole everywhere.
    """
    layer, leaf = path[-2], path[-1]
    axis = None
    if leaf in ("kernel", "bias"):
        heads, columns = config.n_kv_heads % n == 0, config.d_ff % n == 0
        if (layer == "qkv" and heads) or (layer == "gate_up" and columns):
            axis = len(shape) - 3
        elif layer == "proj" and leaf == "kernel" and heads:
            axis = 0
        elif (layer == "up" and columns) or (layer == "down" and leaf == "kernel" and columns):
            axis = len(shape) - 1
    elif layer in ("wte", "lm_head"):
        axis = 0
    if axis is None or shape[axis] % n:
        return PartitionSpec()
    return PartitionSpec(*(AXIS if i == axis else None for i in range(axis + 1)))


def param_shardings(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Return the tree of shardings for a tree of parameters (arrays or their shapes)."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(_names(path), leaf.shape, config, mesh.size))

    return jax.tree_util.tree_map_with_path(sharding, params)


def regroup_tree(params: Any, config: ModelConfig) -> Any:
    """Rearrange all parameters of the plain model, or all adapters to it, for `config`, which `for_devices` made."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: regroup(_names(path), leaf, config), params)


def place(path: tuple[str, ...], array: Any, config: ModelConfig, mesh: Mesh) -> Array:
    """Put one parameter of the plain model on the devices of `mesh`, which share it; each is sent its own part only."""
    array = regroup(path, array, config)
    return jax.device_put(array, NamedSharding(mesh, partition_spec(path, array.shape, config, mesh.size)))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def cache_sharding(config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """Return the sharding of a layer's keys or values [B, K, S, H]: by heads, where attention is."""
    split = config.n_kv_heads % mesh.size == 0
    return NamedSharding(mesh, PartitionSpec(None, AXIS) if split else PartitionSpec())


def split_bytes(params: Any, shardings: Any) -> int:
    """Return the bytes that one device holds of `params` (arrays or their shapes)."""

    def one(leaf: Array, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, params, shardings)))
