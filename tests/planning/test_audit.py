"""What a program multiplies and exchanges is what was put into it."""

import jax
import jax.numpy as jnp

from jgpt.planning.audit import Product, all_reduces, products
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
    assert all_reduces(program) == [256, 256] and all_reduces(program, 257) == []
    compiled = products(parse(jax.jit(f).lower(half, single).compile().as_text()))  # whatever the CPU makes of fp16
    assert sum(compiled.values()) <= 3


def test_an_all_reduce_has_its_bytes():
    mesh = jax.sharding.Mesh(jax.local_devices(), ("devices",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("devices",), ()))
    x = jax.ShapeDtypeStruct((N, 1000), jnp.float32, sharding=split)
    text = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(x).compile().as_text()
    assert all_reduces(parse(text)) == [4000]
