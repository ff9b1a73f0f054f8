"""Costs of a compiled program: by hand on small HLO."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jgpt.hardware.chips import LAUNCH_SECONDS, Rates
from jgpt.model.scopes import SCOPES
from jgpt.planning.hlo import parse
from jgpt.planning.page import milliseconds
from jgpt.planning.roofline import Prediction, predict

RATES = Rates(fp16_flops=1000.0, fp32_flops=100.0, bandwidth=10.0, link=1.0)  # a slow machine, in round numbers
TARGET = 'custom_call_target="__cublas$lt$matmul"'
CONFIG = 'backend_config={"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'


def program(entry: str, computations: str = "", header: str = "") -> str:
    return f"HloModule m{header}\n\n{computations}\n\nENTRY %main () -> f32[] {{\n{entry}\n}}\n"


def cost(text: str, rates: Rates = RATES) -> Prediction:
    return predict(parse(text), rates, SCOPES)


def only(text: str):
    (op,) = cost(text).ops
    return op


def test_a_kernel_takes_the_longer_of_bytes_and_flops():
    op = only(program("  %x = f32[100]{0} parameter(0)\n  ROOT %y = f32[100]{0} add(%x, %x)"))
    assert (op.bytes, op.flops, op.unit, op.seconds) == (800, 100, "memory", 80)
    op = only(program("  %i = s32[] parameter(0)\n  ROOT %y = f32[1000]{0} iota(), iota_dimension=0"))
    assert (op.bytes, op.flops) == (4000, 0)


@pytest.mark.parametrize(
    ("dtype", "kind", "rate"), [("f16", "fp16 gemm", 1000), ("bf16", "bf16 gemm", 1000), ("f32", "fp32 gemm", 100)]
)
def test_a_gemm_runs_on_the_unit_of_its_operands(dtype, kind, rate):
    text = program(
        f"  %a = {dtype}[64,512]{{1,0}} parameter(0)\n  %b = {dtype}[512,64]{{1,0}} parameter(1)\n"
        f"  ROOT %c = (f32[64,64]{{1,0}}, s8[4194304]{{0}}) custom-call(%a, %b), {TARGET}, {CONFIG}"
    )
    fast = Rates(1000.0, 100.0, 1e9, 1.0)
    (op,) = cost(text, fast).ops
    assert op.kind == kind and op.flops == 2 * 64 * 64 * 512 == cost(text, fast).gemm_flops
    assert op.seconds == op.flops / rate
    assert op.bytes == 2 * 64 * 512 * (4 if dtype == "f32" else 2) + 64 * 64 * 4  # the scratch space costs nothing


def test_a_kernel_takes_at_least_its_launch():
    """400 kernels of nothing are 1.6 ms, also on an H100."""
    h100 = Rates(600e12, 300e12, 2.7e12, 4e9)
    lines = [f"  %y{n} = f32[8]{{0}} add(%y{n - 1}, %y{n - 1})" for n in range(1, 400)]
    text = program("\n".join(["  %y0 = f32[8]{0} parameter(0)", *lines, "  ROOT %y = f32[8]{0} add(%y399, %y399)"]))
    found = cost(text, h100)
    assert found.seconds == pytest.approx(400 * LAUNCH_SECONDS) and {op.unit for op in found.ops} == {"launch"}
    assert milliseconds(found.seconds) == "1.6 ms"


def test_batched_products_count_every_product():
    text = program(
        "  %a = f16[3,4,8]{2,1,0} parameter(0)\n  %b = f16[3,8,5]{2,1,0} parameter(1)\n"
        "  ROOT %c = f16[3,4,5]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}"
    )
    assert only(text).flops == 2 * 3 * 4 * 5 * 8


FUSED = 'backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "mask_type": "CAUSAL"}}'
FUSED_ATTENTION = """  %q = bf16[2,64,4,32]{3,2,1,0} parameter(0)
  %k = bf16[2,64,2,32]{3,2,1,0} parameter(1)
  %v = bf16[2,64,2,32]{3,2,1,0} parameter(2)
  %do = bf16[2,64,4,32]{3,2,1,0} parameter(3)
  %fwd = (bf16[2,4,64,32]{3,1,2,0}, f32[2,4,64]{2,1,0}, u8[4096]{0}) custom-call(%q, %k, %v), """
FUSED_ATTENTION += f"""custom_call_target="__cudnn$fmhaSoftmax", metadata={{op_name="jit(f)/h_0/attn/fwd"}}, {FUSED}
  %o = bf16[2,4,64,32]{{3,1,2,0}} get-tuple-element(%fwd), index=0
  %stats = f32[2,4,64]{{2,1,0}} get-tuple-element(%fwd), index=1
  %out = bf16[2,64,4,32]{{3,2,1,0}} bitcast(%o)
  ROOT %bwd = (bf16[2,4,64,32]{{3,1,2,0}}, bf16[2,2,64,32]{{3,1,2,0}}, bf16[2,2,64,32]{{3,1,2,0}}, u8[0]{{0}}) """
FUSED_ATTENTION += "custom-call(%q, %k, %v, %stats, %do, /*index=5*/%out), "
FUSED_ATTENTION += f'custom_call_target="__cudnn$fmhaSoftmaxBackward", {FUSED}'


@pytest.mark.parametrize(("mask", "share"), [("CAUSAL", 0.5), ("NO_MASK", 1.0)])
def test_fused_attention_is_one_op_with_the_products_of_the_pairs_it_sees(mask: str, share: float):
    """As jax.nn.dot_product_attention(implementation="cudnn") compiles: 4 heads of queries share 2 of keys."""
    found = cost(program(FUSED_ATTENTION.replace("CAUSAL", mask)))
    forward, backward = found.ops
    pairs, q, kv, stats = 2 * 4 * 64 * 64, 2 * 64 * 4 * 32 * 2, 2 * 64 * 2 * 32 * 2, 2 * 4 * 64 * 4
    assert forward.kind == backward.kind == "fused attention" and forward.group == "attention"
    assert (forward.flops, backward.flops) == (share * 2 * 2 * pairs * 32, share * 5 * 2 * pairs * 32)
    assert forward.bytes == 2 * q + 2 * kv + stats  # and not the scratch space
    assert backward.bytes == 4 * q + 4 * kv + stats  # q, o and their gradients; k, v and theirs
    assert found.gemm_flops == forward.flops + backward.flops
    assert cost(program(FUSED_ATTENTION), Rates(1.0, 100.0, 1e9, 1.0)).ops[0].unit == "16 bits"


def test_a_fusion_reads_its_slices_only_and_updates_in_place():
    computations = """%fused (p0: f32[9,100], p1: s32[], p2: f32[7,50]) -> (f32[7,50], f32[100]) {
  %p0 = f32[9,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %row = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,100}
  %flat = f32[100]{0} bitcast(%row)
  %e = f32[100]{0} exponential(%flat)
  %half = f32[50]{0} slice(%e), slice={[0:50]}
  %update = f32[1,50]{1,0} bitcast(%half)
  %p2 = f32[7,50]{1,0} parameter(2)
  %written = f32[7,50]{1,0} dynamic-update-slice(%p2, %update, %p1, %p1)
  ROOT %t = (f32[7,50]{1,0}, f32[100]{0}) tuple(%written, %e)
}"""
    entry = """  %a = f32[9,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[7,50]{1,0} parameter(2)
  ROOT %f = (f32[7,50]{1,0}, f32[100]{0}) fusion(%a, %i, %b), kind=kLoop, calls=%fused"""
    op = only(program(entry, computations))
    assert op.bytes == 400 + 4 + 200 + 400  # one row, the index, the update written, the other result
    assert op.flops == 8 * 100  # exponentials are slow


def test_loops_run_their_trips_and_conditionals_their_slowest_branch():
    loops = """%body (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  ROOT %n = f32[10]{0} negate(%p)
}

%twice (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %n = f32[10]{0} negate(%p)
  ROOT %m = f32[10]{0} negate(%n)
}

%below (p: f32[10]) -> pred[] {
  %p = s32[] parameter(0)
  %bound = s32[] constant(7)
  ROOT %lt = pred[] compare(%p, %bound), direction=LT
}"""
    known = 'backend_config={"known_trip_count":{"n":"5"}}'
    start = "  %x = f32[10]{0} parameter(0)\n"
    loop = "ROOT %w = f32[10]{0} while(%x), condition=%below, body=%body"
    assert only(program(f"{start}  {loop}, {known}", loops)).seconds == 5 * 80 / 10
    op = only(program(f"{start}  {loop}", loops))
    assert (op.times, op.seconds) == (7, 7 * 80 / 10)
    branches = "  ROOT %c = f32[10]{0} conditional(%x, %x), branch_computations={%body, %twice}"
    assert len(cost(program(start + branches, loops)).ops) == 2
    call = "  ROOT %c = f32[10]{0} call(%x), to_apply=%twice"
    assert len(cost(program(start + call, loops)).ops) == 2


@pytest.mark.parametrize(
    "groups", ["{{0,1,2,3}}", "[1,4]<=[4]", "mesh['a'=4,'b'=1] {'a'}", "{}"], ids=("list", "iota", "mesh", "all")
)
def test_collectives_move_what_a_ring_moves(groups):
    start = (
        "  %x = f32[100]{0} parameter(0)\n"
        f"  %s = f32[100]{{0}} all-reduce-start(%x), replica_groups={groups}, to_apply=%add\n"
        "  ROOT %d = f32[100]{0} all-reduce-done(%s)"
    )
    op = only(program(start, header=", num_partitions=4"))
    assert (op.group, op.bytes, op.seconds) == ("collective", 400 * 2 * 3 / 4, 600)
    assert only(program(start.replace("all-reduce", "reduce-scatter"), header=", num_partitions=4")).bytes == 300


@pytest.mark.parametrize(
    ("groups", "rate"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 1.0),  # within a host: the link
        ("[2,4]<=[8]", 1.0),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", 1.0),
        ("[1,8]<=[8]", 0.2),  # one ring through both hosts: the network
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 0.2),
        ("[4,2]<=[2,4]T(1,0)", 0.05),  # 0 and 4, 1 and 5, ...: four rings share it
        ("mesh['data'=2,'fsdp'=4] {'data'}", 0.05),
        ("{{0,4},{1,5},{2,6},{3,7}}", 0.05),
    ],
)
def test_what_goes_to_another_host_takes_the_network(groups: str, rate: float):
    text = program(
        f"  %x = f32[100]{{0}} parameter(0)\n  ROOT %s = f32[100]{{0}} collective-permute(%x), replica_groups={groups}",
        header=", num_partitions=8",
    )
    (op,) = predict(parse(text), replace(RATES, network=0.2), SCOPES, hosts=2).ops
    assert op.seconds == pytest.approx(400 / rate)


def test_groups_come_from_the_scopes_of_the_model():
    scopes = ("h_0/attn_norm/mul", "h_0/mlp/up", "jvp(loss)/exp", "optimizer/add", "h_0/add", "wte/take")
    entry = "  %x = f32[5]{0} parameter(0)\n" + "\n".join(
        f'  %y.{i} = f32[5]{{0}} negate(%x), metadata={{op_name="jit(f)/{scope}"}}' for i, scope in enumerate(scopes)
    )
    seconds = cost(program(entry)).by_group()
    assert seconds == {"attention": 4, "mlp": 4, "loss": 4, "optimizer": 4, "collective": 0, "other": 8}


def test_flops_of_a_program_compiled_here():
    compiled = jax.jit(lambda x, y: (x @ y, jnp.tanh(x))).lower(jnp.ones((32, 16)), jnp.ones((16, 64))).compile()
    assert cost(compiled.as_text()).gemm_flops == 2 * 32 * 16 * 64
