"""The matrices of a block, each for itself: a fused kernel holds several side by side.

In the data path: beside `gpt.py`, whose legend names the dimensions. The optimizer asks here, where it treats matrices
as wholes (`step/muon.py`).
"""

from typing import Any

import jax.numpy as jnp
from jax import Array


def is_matrix(path: tuple[str, ...]) -> bool:
    """Tell whether a parameter holds matrices of a block: not an embedding, a norm or a bias. `path` is its keys."""
    return path[-1] == "kernel"


def split_kernel(path: tuple[str, ...], kernel: Array) -> list[Array]:
    """Return the matrices [inputs, outputs] of a kernel ("down" is stored [outputs, inputs]).

    Of "qkv" [D, K, G+2, H] they are query, key and value, of "gate_up" [D, 1, 2, F] gate and up.
    """
    if kernel.ndim == 2:
        return [kernel]
    parts = jnp.split(kernel, _ends(path, kernel.shape), axis=2)
    return [part.reshape(len(kernel), -1) for part in parts]


def join_kernel(path: tuple[str, ...], matrices: list[Array], shape: tuple[int, ...]) -> Array:
    """Return the kernel of `shape` that `split_kernel` took apart."""
    if len(shape) == 2:
        return matrices[0]
    inputs, groups, _, width = shape
    return jnp.concatenate([matrix.reshape(inputs, groups, -1, width) for matrix in matrices], axis=2)


def _ends(path: tuple[str, ...], shape: tuple[Any, ...]) -> list[int]:
    """Return where, on the third axis, each matrix but the last ends."""
    return [shape[2] - 2, shape[2] - 1] if path[-2] == "qkv" else [1]
