"""Muon: the momentum of a matrix, with all its singular values brought near 1, is the update.

In the data path: inside the optimizer, for the matrices of the blocks. Sources: Jordan et al.,
https://kellerjordan.github.io/posts/muon/; Liu et al., arXiv 2502.16982, for the scale of the update.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgpt.model.layers import product_of_transposed
from jgpt.model.matrices import join_kernel, split_kernel
from jgpt.model.parameters import path_names
from jgpt.model.precision import Policy

# Applies a function to independent matrices [n, ...]: some on each device, the results gathered on all.
Share = Callable[[Callable[[Array], Array], Array], Array]

# Newton-Schulz iteration: each step turns a singular value s into a s + b s^3 + c s^5. The first five of Polar Express
# (Amsel et al., arXiv 2505.16932), without its safety factor. On the momenta of a small GPT they left singular values
# 0.08 to 0.37 from 1 in the mean, and Jordan's (3.4445, -4.7750, 2.0315), at the same cost, 0.16 to 0.50.
POLAR_EXPRESS = (
    (8.287212, -23.595887, 17.300387),
    (4.107059, -2.947850, 0.544843),
    (3.948691, -2.908902, 0.551819),
    (3.318420, -2.488488, 0.510049),
    (2.300652, -1.668904, 0.418807),
)
SAFETY = 1.01  # the polynomials hold up to 1, and rounding must not carry a singular value past that
UPDATE_RMS = 0.2  # of an update's elements, which is about AdamW's: so learning rates mean the same at every width


def scale_by_muon(momentum: float, policy: Policy, kept: Any = jnp.float32) -> optax.GradientTransformationExtraArgs:
    """Replace the gradient of each matrix by its orthogonalized Nesterov momentum, times a factor of its shape.

    `optax.contrib.scale_by_muon` (0.2.8) does the same in fp32, on every device, one program for each layer. Here the
    matrix products are in the dtype of the model's, matrices of one shape go through them together, and `update` takes
    `share`, by which devices share the work out. The momentum is kept in the dtype `kept`.
    """
    trace = optax.trace(momentum, nesterov=True, accumulator_dtype=kept)

    def update(updates: Any, state: Any, params: Any = None, *, share: Share | None = None, **_: Any) -> Any:
        updates, state = trace.update(updates, state, params)
        return _orthogonalize_tree(updates, policy, share or alone), state

    return optax.GradientTransformationExtraArgs(trace.init, update)


def alone(function: Callable[[Array], Array], matrices: Array) -> Array:
    """Apply a function to all matrices on this device: the `Share` of one device."""
    return function(matrices)


def _orthogonalize_tree(tree: Any, policy: Policy, share: Share) -> Any:
    """Orthogonalize each matrix in the kernels of a tree."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    kernels = [(path_names(path), kernel) for path, kernel in leaves]
    matrices = [split_kernel(path, kernel) for path, kernel in kernels]
    done = iter(_orthogonalize_all([matrix for parts in matrices for matrix in parts], policy, share))
    joined = [
        join_kernel(path, [next(done) for _ in parts], kernel.shape)
        for (path, kernel), parts in zip(kernels, matrices, strict=True)
    ]
    return jax.tree.unflatten(structure, joined)


def _orthogonalize_all(matrices: list[Array], policy: Policy, share: Share) -> list[Array]:
    """Orthogonalize matrices, those of one shape together (and their transposes), and scale them by their shape."""
    done = list(matrices)
    alike: dict[tuple[int, ...], list[int]] = {}  # a shape's places in the list
    for place, matrix in enumerate(matrices):
        alike.setdefault(tuple(sorted(matrix.shape)), []).append(place)
    for shape, places in alike.items():
        stands = [matrices[place].shape != shape for place in places]  # more rows than columns
        stack = jnp.stack(
            [matrices[place].T if s else matrices[place] for place, s in zip(places, stands, strict=True)]
        )
        results = share(partial(orthogonalize, policy=policy), stack).astype(jnp.float32)
        for place, s, result in zip(places, stands, results * (UPDATE_RMS * shape[1] ** 0.5), strict=True):
            done[place] = result.T if s else result
    return done


def orthogonalize(matrices: Array, policy: Policy) -> Array:
    """Bring the singular values of matrices [n, rows, columns] near 1, rows <= columns.

    The products' operands are in the dtype `policy.compute`; all else is in that of activations, and the result.
    Each matrix is divided by its Frobenius norm first, in fp32: then no singular value, and no element of any product
    below, is far above 1, whatever the scale of the gradients. So fp16 holds them all.
    """
    wide = policy.activations or policy.compute

    def multiply(left: Array, right: Array) -> Array:
        return jnp.matmul(left.astype(policy.compute), right.astype(policy.compute), preferred_element_type=wide)

    norms = jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(1, 2), keepdims=True))
    x = (matrices / jnp.maximum(SAFETY * norms, jnp.finfo(jnp.float32).tiny)).astype(wide)
    for a, b, c in POLAR_EXPRESS:
        gram = jax.vmap(lambda y: product_of_transposed(y, y, wide))(x.mT.astype(policy.compute))
        x = a / SAFETY * x + multiply(b / SAFETY**3 * gram + c / SAFETY**5 * multiply(gram, gram), x)
    return x
