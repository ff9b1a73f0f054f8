"""Which axis of each parameter is split over devices: a path and a shape in, a PartitionSpec out.

As in Megatron-LM (Shoeybi et al., arXiv 1909.08053): attention is split by heads, the MLP by columns then rows, the
embeddings by vocabulary; every device holds the whole residual stream, and the compiler adds up two partial sums a
block. What does not divide stays whole on every device.

Beside the data path: `tensor_parallel.py` and `fsdp.py` place arrays by these rules, and so do loading and planning.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.errors import UserError
from jgpt.model.columns import regroup
from jgpt.model.parameters import path_names
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.strategy import put

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"  # the axes of a mesh, by their names in execution.mesh


def device_mesh(devices: Any, group: int = 0, axis: str = TENSOR) -> Mesh:
    """Return the mesh of devices in groups of so many (0: all). Those of a group share one state, or one model."""
    return Mesh(np.array(devices).reshape(-1, group or len(devices)), (DATA, axis))


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
    return PartitionSpec(*(TENSOR if i == axis else None for i in range(axis + 1)))


def param_shardings(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Return the tree of shardings for a tree of parameters (arrays or their shapes)."""

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path_names(path), leaf.shape, config, mesh.shape[TENSOR]))

    return jax.tree_util.tree_map_with_path(sharding, params)


def place(path: tuple[str, ...], array: Any, config: ModelConfig, mesh: Mesh) -> Array:
    """Put one parameter of the plain model on the devices of `mesh`, which share it; each is sent its own part only."""
    array = regroup(path, array, config)
    return put(array, NamedSharding(mesh, partition_spec(path, array.shape, config, mesh.shape[TENSOR])))


def group_size(mesh: str, axis: str, n_devices: int) -> int:
    """Return how many devices share one state (axis "fsdp") or one model ("tensor"), by `execution.mesh`.

    Raises UserError where the sizes do not multiply to the number of devices.

    >>> group_size("", "fsdp", 8), group_size("data=2,fsdp=4", "fsdp", 8), group_size("tensor=8", "tensor", 8)
    (8, 4, 8)
    """
    if not mesh:
        return n_devices
    found = dict(re.findall(rf"(?:^|,)\s*({DATA}|{axis})\s*=\s*(\d{{1,6}})(?=\s*(?:,|$))", mesh))
    data, group = int(found.get(DATA, 1)), int(found.get(axis, 1))
    if len(found) != mesh.count("=") or not found or data * group != n_devices:
        raise UserError(
            f"execution.mesh={mesh!r}, and there are {n_devices} devices. Allowed with execution.parallel={axis!r}: the"
            f" sizes of the axes '{DATA}' and '{axis}', whose product is the number of devices. Set"
            f" --config.execution.mesh={DATA}=1,{axis}={n_devices}, or --config.execution.mesh='' for one group."
        )
    return group


def split_axis(shape: tuple[int, ...], n: int) -> int:
    """Return the axis along which `n` devices split an array of the state: the first that divides; -1: none.

    Parts of the first axis lie behind one another where all are gathered. Of any other axis XLA keeps a transposed copy
    beside the array. Vectors (norms, biases, counters) stay whole: they are small, and each would cost a collective.

    >>> split_axis((768, 3072), 2), split_axis((25, 16, 3, 64), 4), split_axis((768,), 2), split_axis((3, 5), 2)
    (0, 1, -1, -1)
    """
    if len(shape) < 2:
        return -1
    return next((axis for axis, size in enumerate(shape) if size % n == 0), -1)


def split_bytes(params: Any, shardings: Any) -> int:
    """Return the bytes that one device holds of `params` (arrays or their shapes)."""

    def one(leaf: Array, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, params, shardings)))
