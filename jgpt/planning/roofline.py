"""How long a compiled program takes at least: a parsed program and a device's rates in, seconds of every op out.

Beside the data path: the planner and `scripts/bench/t4_predicted.py` ask it what a step costs on a device that is not
here. Nothing is fitted to a measurement. The assumptions, all of them:

- Ops run one after another. Each takes the longer of its bytes over `bandwidth` and its FLOPs over the rate of the unit
  that runs it, and at least `launch`. (Williams et al., https://doi.org/10.1145/1498765.1498785.) So a step of
  a small model, hundreds of kernels that do little, takes as long as their launches.
- A kernel reads every operand once and writes every result once, whatever it computes in between; no operand is found
  in a cache. Of an operand that is only sliced or gathered from it reads what is taken, and an update in place moves
  the update. A GEMM reaches its unit's rate at any shape.
- cuDNN's fused attention is one kernel: it multiplies in 16 bits, under a causal mask half of the pairs, and moves its
  operands and results only. (Measured on an H100, heads of 64: a sixth of that speed.)
- A GEMM whose operands are 16 bits wide runs on tensor cores (`fp16_flops`), any other at `fp32_flops`.
- Element-wise work runs at `fp32_flops`, one FLOP for each op and element, and `_SLOW_FLOPS` where it takes several
  instructions (exponential, division, ...).
- A ring moves 2 (n - 1) / n of an all-reduce's bytes over `link`, and waits for nothing; no collective overlaps. Where
  its devices are on several hosts it moves them over `network`, of which each device has the share that is left to it
  when all devices of a host exchange at once.
- On a TPU a product is padded to its matrix unit of 128 x 128, arrays in the memory beside its units cost nothing, and
  copies to and from there do not overlap with work.
- A loop runs as often as XLA or its condition says (once where neither does), a conditional takes its slowest branch.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jgpt.hardware.chips import Rates
from jgpt.planning.hlo import Op, Program, Shape
from jgpt.planning.kernels import FREE, PRODUCT_KINDS, work_of

COLLECTIVE, OTHER = "collective", "other"  # the groups of ops that no scope has
# The share of the bytes that a ring moves, times n / (n - 1).
COLLECTIVES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}


@dataclass(frozen=True)
class OpCost:
    """One op, all its runs together: `bytes` and `flops` moved and done, `unit` what it waits for."""

    name: str
    kind: str  # one of PRODUCT_KINDS, "collective", or HLO's opcode
    group: str  # by the scopes that the op comes from, COLLECTIVE, or OTHER
    op_name: str  # JAX's scopes
    times: int
    bytes: float
    flops: float
    unit: str  # "16 bits", "fp32", "memory", "link", "launch"
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The ops of a program that cost time, in program order, and the names of all groups."""

    ops: tuple[OpCost, ...]
    groups: tuple[str, ...]

    @cached_property
    def seconds(self) -> float:
        """Seconds of one run of the program."""
        return math.fsum(op.seconds for op in self.ops)

    @cached_property
    def gemm_flops(self) -> float:
        """FLOPs of the matrix products, those inside fused attention included."""
        return math.fsum(op.flops for op in self.ops if op.kind in PRODUCT_KINDS)

    def by_group(self) -> dict[str, float]:
        """Return the seconds of each group."""
        seconds = dict.fromkeys(self.groups, 0.0)
        for op in self.ops:
            seconds[op.group] += op.seconds
        return seconds


def predict(program: Program, rates: Rates, scopes: Mapping[str, str], hosts: int = 1) -> Prediction:
    """Predict the seconds of a program at a device's `rates`, its devices in equal numbers on so many `hosts`.

    `scopes` maps the names of JAX scopes to the groups in which their ops are added up.
    """
    groups = (*dict.fromkeys(scopes.values()), COLLECTIVE, OTHER)
    return Prediction(tuple(_Walk(program, rates, scopes, program.devices // hosts).costs(program.entry, 1)), groups)


def group_of(op_name: str, scopes: Mapping[str, str]) -> str:
    """Return the group of an op, by the first of the `scopes` on its path.

    >>> scopes = {"attn": "attention"}
    >>> group_of("jit(step)/transpose(jvp(GPT))/h_3/attn/qkv/dot", scopes), group_of("jit(step)/add", scopes)
    ('attention', 'other')
    """
    found = re.search(rf"\b({'|'.join(scopes)})\b", op_name) if scopes else None
    return scopes[found[1]] if found else OTHER


@dataclass(frozen=True)
class _Walk:
    """A walk through a program, which yields the costs of its ops."""

    program: Program
    rates: Rates
    scopes: Mapping[str, str]
    devices_per_host: int

    def costs(self, computation: str, times: int) -> Iterator[OpCost]:
        """Yield the cost of every op of a computation that runs so many `times`."""
        ops = self.program.computations[computation]
        shapes = {op.name: op.shapes for op in ops}
        for op in ops:
            if op.opcode in FREE or op.opcode.endswith(("-done", "-update")):
                continue
            if op.opcode == "while":
                yield from self.costs(op.called("body")[0], times * trips(self.program, op))
            elif op.opcode == "conditional":
                either = op.called("true_computation") + op.called("false_computation")
                branches = [list(self.costs(name, times)) for name in op.called("branch_computations") or either]
                yield from max(branches, key=lambda branch: sum(cost.seconds for cost in branch))
            elif op.opcode in ("call", "async-start"):
                yield from self.costs((op.called("to_apply") or op.called("calls"))[0], times)
            elif (kind := op.opcode.removesuffix("-start")) in COLLECTIVES:
                yield self._collective(op, kind, shapes, times)
            else:
                yield self._kernel(op, shapes, times)

    def _collective(self, op: Op, kind: str, shapes: dict[str, tuple[Shape, ...]], times: int) -> OpCost:
        sent = sum(shape.bytes for name in op.operands for shape in shapes[name])
        group = _group(op, self.program.devices)
        n = len(group)
        share = 1.0 if kind == "collective-permute" else COLLECTIVES[kind] * (n - 1) / n
        moved = sent * (n if kind == "all-gather" else 1) * share * times
        seconds = moved / self._rate(group)
        return OpCost(op.name, "collective", COLLECTIVE, op.op_name, times, moved, 0.0, "link", seconds)

    def _rate(self, group: list[int]) -> float:
        """Return the bytes a second at which a device sends to the next in a ring of these devices."""
        here = sum(device // self.devices_per_host == group[0] // self.devices_per_host for device in group)
        if here == len(group):
            return self.rates.link
        # One of the `here` devices sends to another host; as many rings as there are such parts of a host share it.
        return min(self.rates.link, self.rates.network * here / self.devices_per_host)

    def _kernel(self, op: Op, shapes: dict[str, tuple[Shape, ...]], times: int) -> OpCost:
        """Cost one kernel: a fusion, or a lone op, which is a fusion of itself."""
        if op.opcode == "fusion":
            body = self.program.computations[op.called("calls")[0]]
        else:
            inputs = [Op(name, "parameter", shapes[name], (), "", False) for name in dict.fromkeys(op.operands)]
            shapes_out = op.shapes[:1] if op.opcode.endswith("-start") else op.shapes  # the others: operands, context
            opcode = op.opcode
            if opcode == "slice-start":  # a TPU's: its operands come first
                opcode, shapes_out = "slice", op.shapes[1:2]
            body = [*inputs, Op(op.name, opcode, shapes_out, op.operands, op.rest, True)]
        work = work_of(op.opcode, body)
        seconds = {
            "memory": work.bytes * times / self.rates.bandwidth,
            "16 bits": work.fp16_flops * times / self.rates.fp16_flops,
            "fp32": work.fp32_flops * times / self.rates.fp32_flops,
            "launch": self.rates.launch * times,
        }
        unit = max(seconds, key=lambda name: seconds[name])
        paths = [op.op_name, *(inside.op_name for inside in reversed(body))]
        path = next((path for path in paths if group_of(path, self.scopes) != OTHER), op.op_name)
        return OpCost(
            name=op.name,
            kind=work.kind,
            group=group_of(path, self.scopes),
            op_name=path,
            times=times,
            bytes=work.bytes * times,
            flops=(work.fp16_flops + work.fp32_flops) * times,
            unit=unit,
            seconds=seconds[unit],
        )


def trips(program: Program, loop: Op) -> int:
    """Return how often a loop runs: as XLA noted it, else the bound in a condition "i < constant", else 1."""
    known = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = program.computations[loop.called("condition")[0]]
    constants = [op.find(r"^\((\d+)\)") for op in condition if op.opcode == "constant"]
    return int(constants[0]) if len(constants) == 1 and constants[0] else 1


def _group(op: Op, devices: int) -> list[int]:
    """Return the devices of the first group, from any of the three ways in which XLA prints replica_groups."""
    if listed := op.find(r"replica_groups=\{\{([\d,]+)\}"):
        return [int(device) for device in listed.split(",")]
    if shape := op.find(r"replica_groups=\[([\d,]+)\]<="):
        # [groups, size]<=[dims]T(permutation): 0, 1, ... laid out as dims, transposed, then cut into groups.
        dims = [int(n) for n in op.find(r"replica_groups=\[[\d,]+\]<=\[([\d,]+)\]").split(",")]
        order = [int(n) for n in op.find(r"\]<=\[[\d,]+\]T\(([\d,]+)\)").split(",") if n] or range(len(dims))
        grid = np.arange(math.prod(dims)).reshape(dims).transpose(list(order))
        return [int(device) for device in grid.reshape([int(n) for n in shape.split(",")])[0]]
    if mesh := op.find(r"replica_groups=mesh\[([^\]]*)\]"):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh)
        taken = re.findall(r"'(\w+)'", op.find(r"\] \{([^}]*)\}"))
        grid = np.arange(math.prod(int(size) for _, size in axes)).reshape([int(size) for _, size in axes])
        return [int(d) for d in grid[tuple(slice(None) if axis in taken else 0 for axis, _ in axes)].reshape(-1)]
    return list(range(devices))
