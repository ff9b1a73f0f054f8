"""What the products of a program for a TPU compute: convolutions, as XLA writes them there, and JAX's fused attention.

Beside the data path: `kernels.py` asks. The matrix unit multiplies 128 x 128, and other sides are padded to it.
"""

import re
from typing import NamedTuple

import numpy as np

from jgpt.planning.hlo import Op, Shape

SIDE = 128
# Of each pair of query and key on the vector unit: scale, mask, maximum, exponential (8), sum; backward as many.
_PER_PAIR = 14


class Flops(NamedTuple):
    """FLOPs on the matrix unit, padding among them, and on the vector unit."""

    products: float
    other: float


def padded(size: int) -> int:
    """Return a side of a product as the matrix unit has it. The rows that stream through it are not padded."""
    return -(-size // SIDE) * SIDE


def convolution_flops(op: Op, left: Shape, right: Shape) -> float:
    """Return 2 for every element of the result and every place of the contracted dimensions, in whole matrix units.

    Of a batch of products XLA makes one convolution: its spatial dimensions are the batch, and a window that hits one
    element of it each time. (https://openxla.org/xla/operation_semantics#conv_convolution)
    """
    labels = op.find(r"dim_labels=(\S+?)(?:,|$)")
    found = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels)
    assert found, op.rest
    inputs, kernel, results = (dict(zip(part, dims, strict=True)) for part, dims in zip(
        found.groups(), (left.dims, right.dims, op.shapes[0].dims), strict=True))  # fmt: skip
    hits = 1
    for place, axis in enumerate(sorted(axis for axis in inputs if axis.isdigit())):
        hits *= _hits(_window(op, place), inputs[axis], kernel[axis], results[axis])
    # The unit holds a side of 128 of the contracted dimension and one of the results' features; the rest streams.
    return 2.0 * results["b"] * padded(results["f"]) * padded(kernel["i"]) * hits


def _window(op: Op, place: int) -> dict[str, tuple[int, ...]]:
    """Return what the window of a convolution says of one spatial dimension."""
    text = op.find(r"window=\{([^}]*)\}")
    values = {key: value.split("x")[place] for key, value in re.findall(r"(\w+)=(\S+)", text)}
    return {key: tuple(int(n) for n in value.split("_")) for key, value in values.items()}


def _hits(window: dict[str, tuple[int, ...]], size: int, taps: int, results: int) -> int:
    """Count the pairs of a result and a tap of the window that meet an element of the input, no gap and no padding."""
    stride, low = window.get("stride", (1,))[0], window.get("pad", (0,))[0]
    between, step = window.get("lhs_dilate", (1,))[0], window.get("rhs_dilate", (1,))[0]
    at = np.arange(results)[:, None] * stride + np.arange(taps)[None] * step - low
    return int(np.sum((at >= 0) & (at % between == 0) & (at < size * between)))


def tpu_attention_flops(op: Op, operands: list[Shape]) -> Flops:
    """Return the FLOPs of one of the three kernels of JAX's fused attention.

    Queries [B, N, T, H], keys [B, N, S, H] come first. The forward kernel does two products of each pair of query and
    key, that of d_keys and d_values four, that of d_queries three. Under the causal mask whole blocks are left out.
    """
    (batch, heads, queries, width), keys = operands[0].dims, operands[1].dims[2]
    outputs = [shape for shape in op.shapes if shape.dims == operands[0].dims]
    backward = len([shape for shape in operands if shape.dims == operands[0].dims]) > 3  # d_out is there
    products = 2 if not backward else 4 if len(outputs) == 2 else 3
    blocks = max(1, queries // 512)
    pairs = batch * heads * queries * keys * (blocks + 1) / (2 * blocks)
    return Flops(2.0 * products * pairs * padded(width), _PER_PAIR * pairs)
