"""What a program multiplies and exchanges is what was put into it."""

import jax
import jax.numpy as jnp

from jgpt.planning.audit import Collective, Product, collectives, products
from jgpt.planning.hlo import parse

N = len(jax.local_devices())


def test_products_are_counted_by_their_dtypes():
    half, single = jnp.ones((8, 16), jnp.float16), jnp.ones((8, 16), jnp.float32)

    def f(a, b):
        return (a @ a.T).sum() + (b @ b.T).sum() + (b.T @ b).sum()

    text = """HloModule m, replica_count=2

%fused (a: f16[8,16], b: f16[16,8]) -> f32[8,8] {
  %a = f16[8,16]{1,0} parameter(0)
  %b = f16[16,8]{1,0} parameter(1)
  ROOT %d = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f16[8,16], y: f16[16,8], z: f32[8,8]) -> f32[8,8] {
  %x = f16[8,16]{1,0} parameter(0)
  %y = f16[16,8]{1,0} parameter(1)
  %z = f32[8,8]{1,0} parameter(2)
  %f = f32[8,8]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused
  %c = (f32[8,8]{1,0}, s8[64]{0}) custom-call(%f, %z), custom_call_target="__cublas$gemm"
  %g = f32[8,8]{1,0} get-tuple-element(%c), index=0
  %r = f32[8,8]{1,0} all-reduce(%g), replica_groups={{0,1}}, to_apply=%add
  %h = f16[8,16]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = f32[8,8]{1,0} custom-call(%r, %r), custom_call_target="__cudnn$other"
}
"""
    program = parse(text)
    found = products(program)
    assert found == {Product("f16", "f16", "f32"): 1, Product("f32", "f32", "f32"): 1}
    assert [str(product) for product in found if product.is_wide] == ["f32*f32->f32"]
    assert collectives(program) == [Collective("all-reduce", 256, 1, False)] * 2
    compiled = products(parse(jax.jit(f).lower(half, single).compile().as_text()))  # whatever the CPU makes of fp16
    assert sum(compiled.values()) <= 3


def test_an_all_reduce_has_its_bytes():
    mesh = jax.sharding.Mesh(jax.local_devices(), ("devices",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("devices",), ()))
    x = jax.ShapeDtypeStruct((N, 1000), jnp.float32, sharding=split)
    text = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(x).compile().as_text()
    assert collectives(parse(text)) == [Collective("all-reduce", 4000, 1, False)]


def test_an_exchange_in_a_loop_counts_as_often_as_the_loop_runs():
    """A trap for annotations: XLA sums over the devices in every round what could be summed once."""
    mesh = jax.sharding.Mesh(jax.local_devices(), ("devices",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "devices"))
    x = jax.ShapeDtypeStruct((3, N, 1000), jnp.float32, sharding=split)

    def f(x):
        def add(total, row):
            return jnp.tanh(total + row.sum(axis=0)), total[0]  # its second result is a single number

        return jax.lax.scan(add, jnp.zeros(1000), x)[0]

    (found,) = collectives(parse(jax.jit(f).lower(x).compile().as_text()))
    assert (found.bytes, found.times, found.in_loop) == (4000, 3, True)
