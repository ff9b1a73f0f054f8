"""What a compiled program multiplies and exchanges: the dtypes of its matrix products, what its collectives send.

Beside the data path: a plan reports both, because one fp32 product in an fp16 step, or a second exchange of
gradients, costs a T4 much time.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from jgpt.planning.hlo import Program
from jgpt.planning.roofline import COLLECTIVES, trips


class Product(NamedTuple):
    """The dtypes of one matrix product, in HLO's names."""

    left: str
    right: str
    result: str

    @property
    def is_wide(self) -> bool:
        """Tell whether an operand is wider than 16 bits: no tensor core of a T4 takes it."""
        return not {self.left, self.right} <= {"f16", "bf16"}

    def __str__(self) -> str:
        return f"{self.left}*{self.right}->{self.result}"


def products(program: Program) -> Counter[Product]:
    """Count the matrix products in a program's text, those inside fusions as well: XLA's own and calls of cuBLAS."""
    found: Counter[Product] = Counter()
    for ops in program.computations.values():
        dtypes = {op.name: op.shapes[0].dtype for op in ops if op.shapes}
        for op in (op for op in ops if op.is_product):
            left, right = (dtypes[name] for name in op.operands[:2])
            found[Product(left, right, op.shapes[0].dtype)] += 1
    return found


class Collective(NamedTuple):
    """One exchange between the devices, of arrays."""

    kind: str  # HLO's opcode: "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
    bytes: int  # of its operands on a device, each time
    times: int  # how often it runs in a step
    in_loop: bool


def collectives(program: Program) -> list[Collective]:
    """List the exchanges of a program, those of loops with the number of their rounds; no exchange of single numbers.

    XLA may exchange several arrays in one collective.
    """
    return list(_collectives(program, program.entry, 1, in_loop=False))


def _collectives(program: Program, computation: str, times: int, in_loop: bool) -> Iterator[Collective]:
    ops = program.computations[computation]
    shapes = {op.name: op.shapes for op in ops}
    for op in ops:
        kind = op.opcode.removesuffix("-start")
        given = [shape for name in op.operands for shape in shapes.get(name, ())]
        if op.opcode == "while":
            yield from _collectives(program, op.called("body")[0], times * trips(program, op), in_loop=True)
        elif kind in COLLECTIVES:
            if any(shape.dims for shape in given):
                yield Collective(kind, int(sum(shape.bytes for shape in given)), times, in_loop)
        else:
            for name in op.called("to_apply") + op.called("calls") + op.called("branch_computations"):
                yield from _collectives(program, name, times, in_loop)
