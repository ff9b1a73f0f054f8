"""How long a compiled program takes at least: optimized HLO and a device's rates in, seconds of every op out.

Beside the data path: the planner and `scripts/bench/t4_predicted.py` ask it what a step costs on a device that is not
here. Nothing is fitted to a measurement. The assumptions, all of them:

- Ops run one after another. Each takes the longer of its bytes over `bandwidth` and its FLOPs over the rate of the unit
  that runs it; launching it costs nothing. (Williams et al., https://doi.org/10.1145/1498765.1498785.)
- A kernel reads every operand once and writes every result once, whatever it computes in between; no operand is found
  in a cache. Of an operand that is only sliced or gathered from it reads what is taken, and an update in place moves
  the update. A GEMM reaches its unit's rate at any shape.
- A GEMM whose operands are 16 bits wide runs on tensor cores (`fp16_flops`), any other at `fp32_flops`.
- Element-wise work runs at `fp32_flops`, one FLOP for each op and element, and `_SLOW_FLOPS` where it takes several
  instructions (exponential, division, ...).
- A ring moves 2 (n - 1) / n of an all-reduce's bytes over `link`, and waits for nothing; no collective overlaps.
- A loop runs as often as XLA or its condition says (once where neither does), a conditional takes its dearest branch.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jgpt.planning.hlo import Op, Program, Shape, parse

GROUPS = ("attention", "mlp", "loss", "optimizer", "collective", "other")

# Scopes of the model and the step: a norm belongs to what it feeds.
_SCOPES = {"attn": "attention", "attn_norm": "attention", "mlp": "mlp", "mlp_norm": "mlp", "loss": "loss"}
_SCOPES |= {"accumulate": "optimizer", "optimizer": "optimizer"}

_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "domain"}
_MOVES = _FREE | {"broadcast", "iota", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "pad"}
_MOVES |= {"concatenate", "copy", "gather", "reverse", "copy-start"}
_SLOW = {"exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "power", "divide", "sqrt"}
_SLOW |= {"rsqrt", "cbrt", "sine", "cosine", "tan", "erf", "atan2", "remainder"}
_SLOW_FLOPS = 8
_COLLECTIVES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}


@dataclass(frozen=True)
class Rates:
    """What a device sustains: FLOP/s of GEMMs with 16-bit and other operands, bytes/s of its memory and of its link."""

    fp16_flops: float
    fp32_flops: float
    bandwidth: float
    link: float


@dataclass(frozen=True)
class OpCost:
    """One op, all its runs together: `bytes` and `flops` moved and done, `unit` what it waits for."""

    name: str
    kind: str  # "fp16 gemm", "fp32 gemm" (by the width of the operands), "collective", or HLO's opcode
    group: str  # one of GROUPS
    op_name: str  # JAX's scopes
    times: int
    bytes: float
    flops: float
    unit: str  # "fp16", "fp32", "memory", "link"
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The ops of a program that cost time, in program order."""

    ops: tuple[OpCost, ...]

    @cached_property
    def seconds(self) -> float:
        """Seconds of one run of the program."""
        return math.fsum(op.seconds for op in self.ops)

    @cached_property
    def gemm_flops(self) -> float:
        """FLOPs of the matrix products."""
        return math.fsum(op.flops for op in self.ops if op.kind.endswith(" gemm"))

    def by_group(self) -> dict[str, float]:
        """Return the seconds of each of GROUPS."""
        seconds: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
        for op in self.ops:
            seconds[op.group] += op.seconds
        return seconds


def predict(hlo_text: str, rates: Rates) -> Prediction:
    """Predict a program of optimized HLO (`compiled.as_text()`) at a device's `rates`.

    Raises ValueError where the text is no such program.
    """
    program = parse(hlo_text)
    return Prediction(tuple(_costs(program, program.entry, 1, rates)))


def _costs(program: Program, computation: str, times: int, rates: Rates) -> Iterator[OpCost]:
    """Yield the cost of every op of a computation that runs so many `times`."""
    ops = program.computations[computation]
    shapes = {op.name: op.shapes for op in ops}
    for op in ops:
        if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
            continue
        if op.opcode == "while":
            trips = times * _trips(program, op)
            yield from _costs(program, op.called("body")[0], trips, rates)
        elif op.opcode == "conditional":
            names = op.called("branch_computations") or op.called("true_computation") + op.called("false_computation")
            branches = [list(_costs(program, name, times, rates)) for name in names]
            yield from max(branches, key=lambda branch: sum(cost.seconds for cost in branch))
        elif op.opcode in ("call", "async-start"):
            yield from _costs(program, (op.called("to_apply") or op.called("calls"))[0], times, rates)
        elif (kind := op.opcode.removesuffix("-start")) in _COLLECTIVES:
            yield _collective(program, op, kind, shapes, times, rates)
        else:
            yield _kernel(program, op, shapes, times, rates)


def _trips(program: Program, loop: Op) -> int:
    """Return how often a loop runs: as XLA noted it, else the bound in a condition "i < constant", else 1."""
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = program.computations[loop.called("condition")[0]]
    constants = [op.find(r"^\((\d+)\)") for op in condition if op.opcode == "constant"]
    return int(constants[0]) if len(constants) == 1 and constants[0] else 1


def _collective(
    program: Program, op: Op, kind: str, shapes: dict[str, tuple[Shape, ...]], times: int, rates: Rates
) -> OpCost:
    sent = sum(shape.bytes for name in op.operands for shape in shapes[name])
    n = _group_size(op, program.devices)
    share = 1.0 if kind == "collective-permute" else _COLLECTIVES[kind] * (n - 1) / n
    moved = sent * (n if kind == "all-gather" else 1) * share * times
    return OpCost(op.name, "collective", "collective", op.op_name, times, moved, 0.0, "link", moved / rates.link)


def _group_size(op: Op, devices: int) -> int:
    """Return how many devices take part, from any of the three ways in which XLA prints replica_groups."""
    if listed := op.find(r"replica_groups=\{\{([\d,]+)\}"):
        return listed.count(",") + 1
    if shape := op.find(r"replica_groups=\[([\d,]+)\]<="):
        return int(shape.split(",")[-1])
    if mesh := op.find(r"replica_groups=mesh\[([^\]]*)\]"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", op.find(r"\] \{([^}]*)\}")))
    return devices


def _kernel(program: Program, op: Op, shapes: dict[str, tuple[Shape, ...]], times: int, rates: Rates) -> OpCost:
    """Cost one kernel: a fusion, or a lone op, which is a fusion of itself."""
    if op.opcode == "fusion":
        body = program.computations[op.called("calls")[0]]
    else:
        inputs = [Op(name, "parameter", shapes[name], (), "", False) for name in dict.fromkeys(op.operands)]
        shapes_out = op.shapes[:1] if op.opcode.endswith("-start") else op.shapes  # the others: operands, context
        body = [*inputs, Op(op.name, op.opcode, shapes_out, op.operands, op.rest, True)]
    inner = {o.name: o for o in body}
    moved = _bytes(body, inner) * times
    flops, kind = {"fp16": 0.0, "fp32": sum(_elementwise_flops(o, inner) for o in body) * times}, op.opcode
    for product in (o for o in body if o.is_product):
        narrow = all(inner[name].shapes[0].itemsize <= 2 for name in product.operands[:2])
        flops["fp16" if narrow else "fp32"] += _product_flops(product, inner) * times
        kind = "fp16 gemm" if narrow else "fp32 gemm"
    seconds = {
        "memory": moved / rates.bandwidth,
        "fp16": flops["fp16"] / rates.fp16_flops,
        "fp32": flops["fp32"] / rates.fp32_flops,
    }
    unit = max(seconds, key=lambda name: seconds[name])
    names = [op.op_name, *(o.op_name for o in reversed(body))]
    op_name = next((name for name in names if group_of(name) != "other"), op.op_name)
    return OpCost(op.name, kind, group_of(op_name), op_name, times, moved, sum(flops.values()), unit, seconds[unit])


def group_of(op_name: str) -> str:
    """Return the group of an op by the scopes of the model and the step.

    >>> group_of("jit(step)/while/body/transpose(jvp(GPT))/h_3/attn/qkv/dot_general"), group_of("jit(step)/add")
    ('attention', 'other')
    """
    scope = re.search(rf"\b({'|'.join(_SCOPES)})\b", op_name)
    return _SCOPES[scope[1]] if scope else "other"


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
            written += update.elements * result.shapes[0].itemsize
        elif result.is_product:
            written += result.shapes[0].bytes
        elif not _is_scratch(result, inner):
            written += sum(shape.bytes for shape in result.shapes)
        asked[result.name] = result.elements
    read = 0.0
    for op in reversed(body):
        share = min(asked[op.name] / op.elements, 1.0) if op.elements else 0.0
        if op.opcode == "parameter":
            read += share * sum(shape.bytes for shape in op.shapes)
        for place, name in enumerate(op.operands):
            asked[name] += share * _touched(op, place, inner, op.name in in_place)
    return read + written


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
    contracted = re.findall(
        r"\d+", op.find(r"lhs_contracting_dims=\{([\d,]*)\}") or op.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    )
    left = inner[op.operands[0]].shapes[0].dims
    return 2.0 * op.shapes[0].elements * math.prod(left[int(d)] for d in contracted)


def _elementwise_flops(op: Op, inner: dict[str, Op]) -> float:
    if op.opcode in _MOVES or op.opcode in ("custom-call", "dot"):
        return 0.0
    elements = inner[op.operands[0]].elements if op.opcode.startswith("reduce") else op.elements
    return elements * (_SLOW_FLOPS if op.opcode in _SLOW else 1)
