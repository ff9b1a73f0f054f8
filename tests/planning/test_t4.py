"""configs/kaggle_t4.py, compiled for two T4s: it fits, multiplies in 16 bits, and exchanges gradients once a step.

One layer stands for its twelve, which are alike. No T4 is needed, only the wheels of `pip install jgpt[plan]`; without
them all of this is skipped.
"""

import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.model.scopes import SCOPES
from jgpt.model.shapes import model_config
from jgpt.parallel.build import make_parts
from jgpt.planning.audit import collectives, products
from jgpt.planning.devices import Target, compile_for, compile_only
from jgpt.planning.estimate import estimate
from jgpt.planning.hlo import Program, Shape, parse
from jgpt.planning.page import as_dict, page
from jgpt.planning.summary import Plan, make_plan

CONFIG = Path(__file__).parents[2] / "configs" / "kaggle_t4.py"


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
    """Compile the step of `jgpt.train --config configs/kaggle_t4.py` with one layer of twelve, once."""
    config = kaggle_t4()
    config.model.n_layers = 1
    return make_plan(config, "t4x2", tune=False, run_hours=12.0, weekly_hours=30.0, on_compiled=lambda found: None)


def kaggle_t4() -> ConfigDict:
    return runpy.run_path(str(CONFIG))["get_config"]()


def compile_program(target: Target, f, dtype) -> Program:
    """Compile a function of one [256, 256] matrix on both devices."""
    mesh = jax.sharding.Mesh(np.array(target.devices), ("devices",))
    x = jax.ShapeDtypeStruct((256, 256), dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return parse(compile_for(target, jax.jit(f).lower(x)).as_text())


def wide_products(program: Program) -> list[str]:
    """List the products whose operands are wider than 16 bits."""
    return [f"{n} x {product}" for product, n in products(program).items() if product.is_wide]


def test_it_fits(plan: Plan):
    """No part of the memory grows faster than the layers, so twelve take at most twelve times what one takes."""
    assert plan.found.parts.strategy.shares == 2
    assert plan.target.memory_bytes is not None
    assert kaggle_t4().model.n_layers * plan.found.peak < plan.target.memory_bytes


def test_a_plan_that_does_not_fit(plan: Plan):
    assert plan.fits and plan.found.peak > plan.found.state > 0
    tight = replace(plan, target=replace(plan.target, memory_bytes=plan.found.peak - 1))
    assert not tight.fits


def test_the_page_and_the_dictionary_have_the_predicted_speed(plan: Plan):
    assert "tokens a second" in page(plan, 10) and "link between devices 4 GB/s" in page(plan, 10)
    facts = as_dict(plan, 10)
    assert np.isclose(sum(facts["seconds_by_group"].values()), facts["seconds_per_step"])
    assert list(facts["seconds_by_group"]) == ["attention", "mlp", "loss", "optimizer", "collective", "other"]
    assert all(facts["seconds_by_group"].values()) and len(facts["top_ops"]) == 10
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens_per_step"] / facts["seconds_per_step"])


def test_every_scope_is_found_in_the_step(plan: Plan):
    assert plan.found.program is not None
    paths = {part for ops in plan.found.program.computations.values() for op in ops for part in op.op_name.split("/")}
    named = {name for path in paths for name in SCOPES if name in path.replace("(", " ").replace(")", " ").split()}
    assert named == set(SCOPES)


def test_every_product_is_in_16_bits(plan: Plan):
    assert plan.found.program is not None
    assert wide_products(plan.found.program) == []
    assert sum(products(plan.found.program).values()) > 3 * 4  # they were found: four of a block, forward and backward


def test_the_check_sees_an_fp32_product(t4s: Target):
    """The trap itself: fp32 asked of a forward product makes those of its backward pass fp32 ones."""

    def loss(x):
        return jnp.sum(jnp.tanh(jnp.einsum("ij,jk->ik", x, x, preferred_element_type=jnp.float32)))

    assert wide_products(compile_program(t4s, lambda x: x @ x, jnp.float16)) == []
    assert wide_products(compile_program(t4s, jax.grad(loss), jnp.float16)) != []
    assert wide_products(compile_program(t4s, lambda x: x @ x, jnp.bfloat16)) != []  # no such units on a T4


def test_gradients_are_exchanged_once_a_step(plan: Plan):
    assert plan.found.program is not None
    exchanged = collectives(plan.found.program)
    (average,) = [one for one in exchanged if one.kind == "all-reduce"]
    parameters = plan.found.memory["parameters"]  # in fp32; what is exchanged may be fp16
    assert average.times == 1 and parameters / 2 <= average.bytes <= 1.01 * parameters  # the loss goes along
    assert {one.kind for one in exchanged} <= {"all-reduce", "all-gather"}  # of Muon's updates
    assert not any(one.in_loop for one in exchanged)


@pytest.mark.parametrize("accumulation", [1, 8])
def test_split_states_are_exchanged_once_a_step_whatever_the_accumulation(t4s: Target, accumulation: int):
    """gather=step: nothing inside the loop over micro-batches. gather=layer: all of it inside, but for vectors."""

    def exchanged(gather: str) -> dict[tuple[str, bool], int]:
        config = kaggle_t4()
        config.model.update(n_layers=2, n_heads=2, d_model=128, context_length=128, vocab_size=512)
        config.batch.global_batch_size = 2 * accumulation
        config.execution.update(micro_batch_size=1, remat="block", parallel="fsdp", gather=gather)
        found = estimate(config, model_config(config.model, 512), t4s)
        assert found.program is not None and found.parts.accumulation == accumulation
        counted: Counter[tuple[str, bool]] = Counter()
        for one in collectives(found.program):
            counted[one.kind, one.in_loop] += one.times
        return dict(counted)

    step, layer = exchanged("step"), exchanged("layer")
    assert {kind for kind, in_loop in step if in_loop} == set()
    assert step["all-gather", False] >= 1 and step["reduce-scatter", False] >= 1
    # Each block gathers its four matrices forward and backward, or several of them in one all-gather.
    assert layer["all-gather", accumulation > 1] >= 2 * 2 * accumulation
    assert layer["reduce-scatter", accumulation > 1] >= 2 * accumulation


def scores_in(program: Program, length: int) -> list[Shape]:
    """List the arrays with a side of queries and a side of keys, whole or in the four chunks of `chunked_vjp`."""
    sides = {length // 4 * n for n in (1, 2, 3, 4)}
    shapes = {shape for ops in program.computations.values() for op in ops for shape in op.shapes}
    return [shape for shape in shapes if sum(side in sides for side in shape.dims) > 1]


def test_fused_attention_fits_stores_no_scores_and_exchanges_once(t4s: Target, plan: Plan):
    """configs/kaggle_t4.py with execution.attention=flash, again with one layer of twelve."""
    config = kaggle_t4()
    config.model.n_layers, config.execution.attention = 1, "flash"
    found = estimate(config, model_config(config.model, config.tokenizer.vocab_size), t4s)
    assert found.program is not None and plan.found.program is not None and t4s.memory_bytes is not None
    assert kaggle_t4().model.n_layers * found.peak < t4s.memory_bytes and found.peak < plan.found.peak
    calls = [op for ops in found.program.computations.values() for op in ops if op.is_our_attention]
    assert len(calls) == 3  # forward, and two of the backward pass
    length = config.model.context_length
    assert scores_in(plan.found.program, length) and not scores_in(found.program, length)
    (average,) = [one for one in collectives(found.program) if one.kind == "all-reduce"]
    assert average.times == 1 and not any(one.in_loop for one in collectives(found.program))
    assert wide_products(found.program) == []


def test_flash_where_devices_share_a_model(t4s: Target):
    """Each runs the kernels on its own heads. Heads that do not divide, and fp32, are refused in a line."""

    def attention(n_heads: int, compute: str, wanted: str = "flash") -> str:
        config = kaggle_t4()
        config.model.n_heads, config.precision.compute, config.lora.rank = n_heads, compute, 4
        config.execution.update(parallel="tensor", attention=wanted)
        return make_parts(config, model_config(config.model, 512), t4s.devices).model.attention

    assert attention(10, "fp16") == "flash" and attention(10, "fp16", "auto") == "chunked"
    with pytest.raises(UserError, match="parallel='tensor', 5 key/value heads on 2 devices in float16.*attention=auto"):
        attention(5, "fp16")
    with pytest.raises(UserError, match="'flash' on sm_75 in float32 with heads 64 wide"):
        attention(10, "fp32")


@pytest.mark.parametrize("gather", ["step", "layer"])
def test_flash_where_devices_split_the_state(t4s: Target, gather: str):
    """All of a step runs in a shard_map there, and so do the kernels: traced for two T4s, not compiled."""
    config = kaggle_t4()
    config.model.update(n_layers=1, n_heads=2, d_model=128, context_length=128, vocab_size=512)
    config.execution.update(micro_batch_size=1, remat="block", parallel="fsdp", gather=gather, attention="flash")
    text = make_parts(config, model_config(config.model, 512), t4s.devices).lower().as_text()
    assert text.count("triton_kernel_call") >= 3  # forward, and two of the backward pass


def test_flash_with_dropout_says_once_that_training_takes_another_form(t4s: Target, caplog):
    config = kaggle_t4()
    config.model.dropout, config.execution.attention = 0.123, "flash"
    for _ in range(2):
        make_parts(config, model_config(config.model, 512), t4s.devices)
    assert caplog.text.count("model.dropout=0.123: a fused kernel drops no weights") == 1


def test_the_check_sees_a_second_exchange(t4s: Target):
    mesh = jax.sharding.Mesh(np.array(t4s.devices), ("devices",))
    split = NamedSharding(mesh, PartitionSpec("devices"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((2, 1 << 20), jnp.float32, sharding=split)

    def once(x):
        return jax.lax.with_sharding_constraint(x.sum(axis=0), whole)

    def twice(x):
        return once(x * jnp.tanh(once(x))[None])  # the second waits for the first: no compiler makes one of them

    counts = [
        len(collectives(parse(compile_for(t4s, jax.jit(f, out_shardings=whole).lower(x)).as_text())))
        for f in (once, twice)
    ]
    assert counts == [1, 2]
