"""What a compiled program multiplies and exchanges: the dtypes of its matrix products, the bytes of its all-reduces.

Beside the data path: a plan reports both, because one fp32 product in an fp16 step, or a second exchange of
gradients, costs a T4 much time.
"""

from collections import Counter
from typing import NamedTuple

from jgpt.planning.hlo import Program


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


def all_reduces(program: Program, at_least: int = 0) -> list[int]:
    """Return the bytes that each all-reduce of a program sums, of those with `at_least` so many."""
    found = []
    for ops in program.computations.values():
        sizes = {op.name: sum(shape.bytes for shape in op.shapes) for op in ops}
        summed = (
            sum(sizes[name] for name in op.operands) for op in ops if op.opcode in ("all-reduce", "all-reduce-start")
        )
        found += [int(size) for size in summed if size >= at_least]
    return found
