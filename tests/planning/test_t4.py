"""configs/kaggle_t4.py, compiled for two T4s: it fits, multiplies in 16 bits, and exchanges gradients once a step.

No T4 is needed, only the wheels of `pip install jgpt[plan]`; without them all of this is skipped.
"""

import runpy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.errors import UserError
from jgpt.planning.audit import all_reduces, products
from jgpt.planning.devices import Target, compile_for, compile_only
from jgpt.planning.hlo import Program, parse
from jgpt.planning.summary import Plan, make_plan

CONFIG = Path(__file__).parents[2] / "configs" / "kaggle_t4.py"
GRADIENTS = 1 << 20  # bytes: an all-reduce of more sums gradients, of less the loss and the like


@pytest.fixture(scope="module")
def t4s(optimized: None) -> Target:
    """Two T4s; skip where this machine cannot compile for them."""
    try:
        target = compile_only("t4x2")
        compile_program(target, lambda x: x @ x, jnp.float16)
    except UserError as error:
        pytest.skip(str(error))
    return target


@pytest.fixture(scope="module")
def plan(t4s: Target) -> Plan:
    """Compile the step that `jgpt.train --config configs/kaggle_t4.py` runs, once."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    return make_plan(config, "t4x2", False, 12.0, 30.0, lambda found: None)


def compile_program(target: Target, f, dtype) -> Program:
    """Compile a function of one [256, 256] matrix on both devices."""
    mesh = jax.sharding.Mesh(np.array(target.devices), ("devices",))
    x = jax.ShapeDtypeStruct((256, 256), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return parse(compile_for(target, jax.jit(f).lower(x)).as_text())


def wide_products(program: Program) -> list[str]:
    """List the products whose operands are wider than 16 bits."""
    return [f"{n} x {product}" for product, n in products(program).items() if product.is_wide]


def test_it_fits(plan: Plan):
    assert plan.found.parts.strategy.shares == 2
    assert plan.fits, f"{plan.found.peak / 2**30:.2f} GiB"
    assert plan.found.peak > plan.found.state > 0
    tight = replace(plan, target=replace(plan.target, memory_bytes=plan.found.peak - 1))
    assert not tight.fits


def test_every_product_is_in_16_bits(plan: Plan):
    assert plan.found.program is not None
    assert wide_products(plan.found.program) == []
    assert sum(products(plan.found.program).values()) > 4 * 12  # they were found: four layers of each block at least


def test_the_check_sees_an_fp32_product(t4s: Target):
    """The trap itself: fp32 asked of a forward product makes those of its backward pass fp32 ones."""

    def loss(x):
        return jnp.sum(jnp.tanh(jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32)))

    assert wide_products(compile_program(t4s, lambda x: x @ x, jnp.float16)) == []
    assert wide_products(compile_program(t4s, jax.grad(loss), jnp.float16)) != []
    assert wide_products(compile_program(t4s, lambda x: x @ x, jnp.bfloat16)) != []  # no such units on a T4


def test_gradients_are_exchanged_once_a_step(plan: Plan):
    assert plan.found.program is not None
    exchanged = all_reduces(plan.found.program, GRADIENTS)
    assert len(exchanged) == 1, exchanged
    parameters = plan.found.memory["parameters"]  # in fp32; what is exchanged may be fp16
    assert parameters / 2 <= exchanged[0] <= 1.01 * parameters  # the loss goes along


def test_the_check_sees_a_second_exchange(t4s: Target):
    mesh = jax.sharding.Mesh(np.array(t4s.devices), ("devices",))
    split = NamedSharding(mesh, PartitionSpec("devices"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((2, GRADIENTS), jnp.float32, sharding=split)

    def once(x):
        return jax.lax.with_sharding_constraint(x.sum(axis=0), whole)

    def twice(x):
        return once(x * jnp.tanh(once(x))[None])  # the second waits for the first: no compiler makes one of them

    counts = [
        len(all_reduces(parse(compile_for(t4s, jax.jit(f, out_shardings=whole).lower(x)).as_text()), GRADIENTS))
        for f in (once, twice)
    ]
    assert counts == [1, 2]
