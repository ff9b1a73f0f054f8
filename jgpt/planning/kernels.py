"""What one kernel of a compiled program reads, writes and computes: its ops in, bytes and FLOPs out.

Beside the data path: `planning/roofline.py` turns both into seconds, and has the assumptions that they rest on.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from jgpt.planning.hlo import Op, Shape
from jgpt.planning.tpu_kernels import convolution_flops, tpu_attention_flops

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "domain"}
_MOVES = FREE | {"broadcast", "iota", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "pad"}
_MOVES |= {"concatenate", "copy", "gather", "reverse", "copy-start"}
_SLOW = {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "power", "divide", "sqrt"}
_SLOW |= {"rsqrt", "cbrt", "sine", "cosine", "tan", "erf", "atan2", "remainder"}
_SLOW_FLOPS = 8
# Of the rate of a large product, as our kernels should reach it on a T4: 20 and 16 of 24 TFLOP/s (docs/flash.md).
OUR_SHARES = {"forward": 20 / 24, "backward_q": 16 / 24, "backward_kv": 16 / 24}
# Calls with which XLA names memory of a TPU, and tells its compiler facts: they run nothing.
_NOTES = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
PRODUCT_KINDS = ("fp16 gemm", "bf16 gemm", "fp32 gemm", "fused attention")  # by the operands


class Work(NamedTuple):
    """What one run of a kernel does; `kind` is one of PRODUCT_KINDS, or HLO's opcode."""

    kind: str
    bytes: float
    fp16_flops: float  # on tensor cores
    fp32_flops: float


def work_of(opcode: str, body: list[Op]) -> Work:
    """Add up a kernel: the computation of a fusion, or a lone op behind its parameters."""
    inner = {op.name: op for op in body}
    if body[-1].custom_call_target in _NOTES:
        return Work(opcode, 0.0, 0.0, 0.0)
    fp16, fp32, kind = 0.0, sum(_elementwise_flops(op, inner) for op in body), opcode
    for op in body:
        if op.is_product:
            narrow = all(inner[name].shapes[0].itemsize <= 2 for name in op.operands[:2])
            flops = _product_flops(op, inner)
            if op.opcode == "convolution":  # a TPU's matrix unit rounds fp32 to bf16, unless more was asked for
                narrow = "highest" not in op.find(r"operand_precision=\{([^}]*)\}")
            fp16, fp32 = (fp16 + flops, fp32) if narrow else (fp16, fp32 + flops)
            left = inner[op.operands[0]].shapes[0].dtype
            kind = ("fp16 gemm" if left == "f16" else "bf16 gemm") if narrow else "fp32 gemm"
        elif op.is_fused_attention:
            fp16, kind = fp16 + _attention_flops(op, inner), "fused attention"
            if op.is_tpu_attention:
                fp32 += tpu_attention_flops(op, [inner[name].shapes[0] for name in op.operands]).other
    return Work(kind, _bytes(body, inner), fp16, fp32)


def _bytes(body: list[Op], inner: dict[str, Op]) -> float:
    """Count the bytes that a kernel reads and writes.

    Walked from the results back, every op asks for the elements of its operands that it touches, at most all of them.
    """
    root = next(op for op in body if op.is_root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    asked: defaultdict[str, float] = defaultdict(float)
    written = 0.0
    in_place = set()
    for result in results:
        while result.opcode in ("bitcast", "get-tuple-element") and not _is_scratch(result, inner):
            asked[result.name] = result.elements
            result = inner[result.operands[0]]
        if result.opcode in ("dynamic-update-slice", "scatter"):
            in_place.add(result.name)
            update = inner[result.operands[1 if result.opcode == "dynamic-update-slice" else -1]]
            written += update.elements * result.shapes[0].hbm_itemsize
        elif result.is_product:
            written += _moved(result.shapes[:1])
        elif result.is_fused_attention:
            written += _moved(shape for shape in result.shapes if shape.dtype != "u8")  # which is scratch space
        elif not _is_scratch(result, inner):
            written += _moved(result.shapes)
        asked[result.name] = result.elements
    read = 0.0
    for op in reversed(body):
        share = min(asked[op.name] / op.elements, 1.0) if op.elements else 0.0
        if op.opcode == "parameter":
            read += share * _moved(op.shapes)
        for place, name in enumerate(op.operands):
            asked[name] += share * _touched(op, place, inner, op.name in in_place)
    return read + written


def _moved(shapes: Iterable[Shape]) -> float:
    return sum(shape.elements * shape.hbm_itemsize for shape in shapes)


def _touched(op: Op, place: int, inner: dict[str, Op], in_place: bool) -> float:
    """Return how many elements of its operand at `place` an op touches to make all of its result."""
    if place == 0 and op.opcode in ("slice", "dynamic-slice", "gather"):
        return op.elements
    if place == 0 and in_place:
        return inner[op.operands[-1]].elements if op.opcode == "scatter" else 0.0
    return inner[op.operands[place]].elements


def _is_scratch(op: Op, inner: dict[str, Op]) -> bool:
    """Tell the second result of a call of cuBLAS, its scratch space."""
    return op.opcode == "get-tuple-element" and inner[op.operands[0]].is_product and op.find(r"index=(\d+)") != "0"


def _product_flops(op: Op, inner: dict[str, Op]) -> float:
    """Return 2 for every element of the result and every place of the contracted dimensions."""
    if op.opcode == "convolution":
        return convolution_flops(op, *(inner[name].shapes[0] for name in op.operands[:2]))
    contracted = re.findall(
        r"\d+", op.find(r"lhs_contracting_dims=\{([\d,]*)\}") or op.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    )
    left = inner[op.operands[0]].shapes[0].dims
    return 2.0 * op.shapes[0].elements * math.prod(left[int(d)] for d in contracted)


def _attention_flops(op: Op, inner: dict[str, Op]) -> float:
    """Return the FLOPs of fused attention: two products for each pair of query and key, backward five.

    JAX gives cuDNN queries [B, T, N, H] and keys [B, S, K, H] first. Under a causal mask it skips half of the pairs.
    """
    if op.is_our_attention:
        return _our_attention_flops(op, inner)
    if op.is_tpu_attention:
        return tpu_attention_flops(op, [inner[name].shapes[0] for name in op.operands]).products
    (batch, queries, heads, width), keys = (inner[name].shapes[0].dims for name in op.operands[:2])
    products = 5 if "Backward" in op.custom_call_target else 2
    share = 0.5 if op.find(r'"mask_type": ?"(\w*CAUSAL)') else 1.0
    return 2.0 * products * batch * heads * queries * keys[1] * width * share


def _our_attention_flops(op: Op, inner: dict[str, Op]) -> float:
    """Return the FLOPs of a kernel of ours, as many as a matrix product does in its time.

    Every kernel has fp32 numbers of [B, N, T] among its results (forward, backward_q) or operands (backward_kv), and
    fp16 arrays whose last side is H. They do 2, 3 and 4 products of the causal half of the pairs, backward_q and
    backward_kv one each again. No kernel reaches a plain product's rate: OUR_SHARES.
    """
    operands = [inner[name].shapes[0] for name in op.operands]
    width = operands[0].dims[-1]
    numbers = [shape for shape in op.shapes if shape.dtype == "f32"]
    kernel = "backward_kv" if not numbers else "forward" if len(operands) < 7 else "backward_q"
    batch, heads, length = (numbers or [shape for shape in operands if shape.dtype == "f32"])[0].dims
    products = {"forward": 2, "backward_q": 3, "backward_kv": 4}[kernel]
    return products * batch * heads * length**2 * width / OUR_SHARES[kernel]


def _elementwise_flops(op: Op, inner: dict[str, Op]) -> float:
    if op.opcode in _MOVES or op.opcode in ("custom-call", "dot", "convolution"):
        return 0.0
    elements = inner[op.operands[0]].elements if op.opcode.startswith("reduce") else op.elements
    return elements * (_SLOW_FLOPS if op.opcode in _SLOW else 1)
