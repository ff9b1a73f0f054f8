"""Optimized HLO, read: shapes, operands and attributes as XLA prints them, in both printers' habits."""

import jax
import jax.numpy as jnp
import pytest

from jgpt.planning.hlo import Shape, parse

TEXT = """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=2

%body (p: (s32[], f16[4,8])) -> (s32[], /*index=1*/f16[4,8]) {
  %p = (s32[], f16[4,8]{1,0:T(8,128)}) parameter(0)
  ROOT %t = (s32[], /*index=1*/f16[4,8]{1,0}) tuple(%p, %p)
}

ENTRY %main.3 (x: f16[4,8]) -> f16[4,8] {
  %x = f16[4,8]{1,0} parameter(0), metadata={op_name="x (an input)"}
  %loop = (s32[], f16[4,8]{1,0}) while(%x), condition=%body, body=%body
  %if = f16[] conditional(%x, %x), branch_computations={%body, %other}
  ROOT %sum = f16[4,8]{1,0} add(f16[4,8]{1,0} %x, f16[4,8]{1,0} %x), metadata={op_name="jit(f)/add"}
}
"""


def test_a_program_is_its_computations_ops_and_devices():
    program = parse(TEXT)
    assert program.entry == "main.3" and program.devices == 2
    assert [op.name for op in program.computations["body"]] == ["p", "t"]
    x, loop, conditional, total = program.computations["main.3"]
    assert (x.opcode, x.operands, x.op_name) == ("parameter", (), "x (an input)")
    assert loop.shapes == (Shape("s32", ()), Shape("f16", (4, 8))) and loop.elements == 33
    assert loop.called("body") == ["body"] and conditional.called("branch_computations") == ["body", "other"]
    assert total.operands == ("x", "x") and total.is_root and not x.is_root and total.called("body") == []


@pytest.mark.parametrize(("dtype", "itemsize"), [("f16", 2), ("pred", 1), ("s4", 0.5), ("f8e4m3fn", 1), ("token", 0)])
def test_bytes_of_a_dtype(dtype, itemsize):
    assert Shape(dtype, (3, 2)).bytes == 6 * itemsize


def test_what_the_compiler_here_prints_is_read():
    program = parse(jax.jit(lambda x: jnp.sum(jnp.tanh(x @ x))).lower(jnp.ones((8, 8))).compile().as_text())
    assert any(op.is_root for op in program.computations[program.entry])
    assert any("tanh" in op.opcode for ops in program.computations.values() for op in ops)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("not a program")
