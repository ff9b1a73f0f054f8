"""Read optimized HLO: the text of a compiled program in, its computations and ops out.

Beside the data path: `planning/roofline.py` adds up what these ops cost. The grammar is that of XLA's own printer
(https://openxla.org/xla/operation_semantics), as `compiled.as_text()` gives it on jax 0.7 to 0.12.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f16": 2, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_OP = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$")


class Shape(NamedTuple):
    """One array: `dtype` in HLO's names ("f32", "pred"); `on_chip`: in a TPU's memory beside its units, not HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def elements(self) -> int:
        """The count of elements; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        width = re.search(r"\d+", self.dtype)
        return _BYTES.get(self.dtype, int(width[0]) / 8 if width else 0)

    @property
    def bytes(self) -> float:
        """Bytes of the array."""
        return self.elements * self.itemsize

    @property
    def hbm_itemsize(self) -> float:
        """Bytes of an element that go to or come from the device's main memory, when it is written or read."""
        return 0 if self.on_chip else self.itemsize


@dataclass(frozen=True)
class Op:
    """One instruction. `shapes` are its results (several of a tuple), `rest` is what stands behind the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def elements(self) -> int:
        """The count of elements of all results."""
        return sum(shape.elements for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The path of JAX scopes that the op comes from; "" where XLA made it."""
        return self.find(r'op_name="([^"]*)"')

    @property
    def custom_call_target(self) -> str:
        """The library function that a custom call runs; "" for other ops."""
        return self.find(r'custom_call_target="([^"]*)"') if self.opcode == "custom-call" else ""

    @property
    def is_product(self) -> bool:
        """Tell a matrix product: XLA's own, which for a TPU are convolutions, or a call of cuBLAS."""
        return self.opcode in ("dot", "convolution") or "__cublas" in self.custom_call_target

    @property
    def is_fused_attention(self) -> bool:
        """Tell a call of fused attention: cuDNN's, JAX's for TPUs, or a kernel of our own."""
        return self.custom_call_target.startswith("__cudnn$fmha") or self.is_our_attention or self.is_tpu_attention

    @property
    def is_tpu_attention(self) -> bool:
        """Tell a call of the kernels in `model/attention/flash_tpu.py`; nothing else here is written in Pallas."""
        return self.custom_call_target == "tpu_custom_call"

    @property
    def is_our_attention(self) -> bool:
        """Tell a call of the kernels in `model/attention/flash/`; nothing else here is launched so."""
        return self.custom_call_target == "triton_kernel_call"

    def find(self, pattern: str) -> str:
        """Return the first group of a pattern in `rest`, or ""."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        """Return the names of the computations in an attribute: one, or several in braces; [] where it is not there."""
        found = self.find(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)")
        return re.findall(r"[\w.-]+", found)


@dataclass(frozen=True)
class Program:
    """A module: its computations by name, in the order of their ops; `devices` run it together."""

    entry: str
    computations: dict[str, list[Op]]
    devices: int


def parse(text: str) -> Program:
    """Read optimized HLO. Raises ValueError where the text has no entry computation."""
    computations: dict[str, list[Op]] = {}
    entry, ops = "", []
    for line in text.splitlines():
        if line[:1] in ("%", "E") and (head := _HEAD.match(line)):
            ops = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif start := _OP.match(line):
            ops.append(_op(line, start))
    if not entry:
        raise ValueError("this text has no ENTRY computation: it is not the HLO of a compiled program")
    header = text[: text.find("\n")]
    counts = [int(n) for n in re.findall(r"(?:replica_count|num_partitions)=(\d+)", header)]
    return Program(entry, computations, max(counts, default=1))


def _op(line: str, start: re.Match[str]) -> Op:
    at = start.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)  # the result: a tuple, or an array
    shapes = tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), on_chip="S(1)" in layout)
        for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", line[at:end])
    )
    opening = line.index("(", end)
    closing = _closing(line, opening)
    inside = line[opening:closing]
    # Operands are names, behind their shapes in older printers; a constant's or a parameter's brackets hold a value.
    operands = tuple(re.findall(r"%([\w.-]+)", inside))
    return Op(start[2], line[end:opening].strip(), shapes, operands, inside + line[closing:], bool(start[1]))


def _closing(line: str, opening: int) -> int:
    """Return the place behind the bracket that closes the one at `opening`."""
    depth = 0
    for place in re.finditer(r"[()]", line[opening:]):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return opening + place.end()
    raise ValueError(f"a bracket is not closed in this line of HLO: {line[:200]}")
