"""The launch from JAX: what jaxlib is given, and the program that XLA makes of it for a T4 that is not here."""

import re
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.model.attention.flash import FlashUnavailable, check, flash, flash_qkv, launch, supports
from jgpt.model.columns import for_devices
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.tensor_parallel import TensorParallel

SHAPE = (2, 100, 3, 2, 64)  # B, T, K, G, H


@pytest.fixture(autouse=True)
def no_memory_of_the_module() -> Iterator[None]:
    """`launch` keeps the module that it found, and JAX what it traced."""
    find = launch._gpu_triton
    find.cache_clear()
    jax.clear_caches()
    yield
    find.cache_clear()
    jax.clear_caches()


class Call:
    """A TritonKernelCall that shows what it was given."""

    def __init__(self, kernel: Any, x: int, y: int, z: int, parameters: list[Any]):
        self.kernel, self.grid, self.parameters = kernel, (x, y, z), parameters
        CALLS.append(self)

    def to_proto(self, name: str, metadata: bytes) -> bytes:
        return name.encode()


CALLS: list[Call] = []


class NewKernel:
    """TritonKernel as in jaxlib 0.8 to 0.12."""

    def __init__(self, name: str, warps: int, ctas: int, shared: int, ptx: str, ttir: str, capability: int):
        if not isinstance(ptx, str) or not isinstance(shared, int):
            raise TypeError("incompatible function arguments")
        self.found = (name, warps, shared, ptx, capability)


class OldKernel:
    """TritonKernel as in jaxlib 0.7."""

    def __init__(
        self, name: str, warps: int, shared: int, ptx: str, ttir: str, capability: int, x: int, y: int, z: int
    ):
        if not isinstance(ptx, str) or not isinstance(shared, int):
            raise TypeError("incompatible function arguments")
        self.found = (name, warps, shared, ptx, capability)


def fake(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Put a module of ours in the place of jaxlib.gpu_triton."""
    module = types.SimpleNamespace(
        TritonKernel=kernel, TritonKernelCall=Call,
        create_array_parameter=lambda zeroed, alignment: ("array", zeroed, alignment),
        create_scalar_parameter=lambda value, dtype: (dtype, value),
    )  # fmt: skip
    CALLS.clear()
    monkeypatch.setattr(launch, "_gpu_triton", lambda: module)


def abstract(shape: tuple[int, ...] = SHAPE) -> tuple[jax.ShapeDtypeStruct, ...]:
    batch, length, groups, members, width = shape
    kv = jax.ShapeDtypeStruct((batch, length, groups, width), jnp.float16)
    return jax.ShapeDtypeStruct(shape, jnp.float16), kv, kv


def gradients(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(flash(q, k, v, segments, capability=75).astype(jnp.float32))

    return jax.grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize("kernel", [NewKernel, OldKernel])
def test_every_known_signature(monkeypatch: pytest.MonkeyPatch, kernel: Any):
    fake(monkeypatch, kernel)
    check()
    found = jax.eval_shape(gradients, *abstract())
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in abstract()]
    names = [call.kernel.found[0] for call in CALLS]
    assert names == ["flash_forward_64", "flash_backward_q_64", "flash_backward_kv_64"]
    assert all(call.kernel.found[4] == 75 and call.kernel.found[1] == 4 for call in CALLS)
    arrays = [sum(p[0] == "array" for p in call.parameters) for call in CALLS]
    assert arrays == [6, 9, 9]
    assert [call.grid for call in CALLS] == [(1, 6, 2), (1, 6, 2), (2, 3, 2)]
    scalars = [value for dtype, value in (p for p in CALLS[0].parameters if p[0] == "i32")]
    assert scalars == [100, 2, 3 * 2 * 64, 2 * 64, 3 * 64, 64, 0, 0, 0]


def test_one_array(monkeypatch: pytest.MonkeyPatch):
    """The parameters of the fused form: offsets, strides, and segments counted."""
    fake(monkeypatch, NewKernel)
    qkv, segments = jax.ShapeDtypeStruct((2, 100, 3, 4, 64), jnp.float16), jax.ShapeDtypeStruct((2, 100), jnp.int32)
    found = jax.eval_shape(
        jax.grad(lambda x, s: jnp.sum(flash_qkv(x, s, capability=90).astype(jnp.float32))), qkv, segments
    )
    assert found.shape == qkv.shape and found.dtype == qkv.dtype
    assert [sum(p[0] == "array" for p in call.parameters) for call in CALLS] == [6, 9, 9]
    for call in CALLS:
        row, group = 3 * 4 * 64, 4 * 64
        scalars = [p[1] for p in call.parameters if p[0] == "i32"]
        assert scalars == [100, 2, row, group, row, group, 2 * 64, 3 * 64, 1]
        assert call.kernel.found[4] == 90


def test_a_signature_that_is_not_known(monkeypatch: pytest.MonkeyPatch):
    class Unknown:
        def __init__(self, **what: Any):
            """TritonKernel(everything by name)"""

    fake(monkeypatch, Unknown)
    with pytest.raises(FlashUnavailable, match="signature that is not known: TritonKernel\\(everything by name"):
        check()
    with pytest.raises(FlashUnavailable):
        jax.eval_shape(gradients, *abstract())


def test_a_jaxlib_without_the_entry(monkeypatch: pytest.MonkeyPatch):
    import jaxlib

    empty = types.ModuleType("jaxlib.gpu_triton")
    monkeypatch.setitem(__import__("sys").modules, "jaxlib.gpu_triton", empty)
    monkeypatch.setattr(jaxlib, "gpu_triton", empty, raising=False)
    with pytest.raises(FlashUnavailable, match="has no TritonKernel"):
        check()
    monkeypatch.setitem(__import__("sys").modules, "jaxlib.gpu_triton", None)
    monkeypatch.delattr(jaxlib, "gpu_triton")
    launch._gpu_triton.cache_clear()
    with pytest.raises(FlashUnavailable, match="no module gpu_triton"):
        check()


def test_what_there_are_kernels_for():
    assert supports(64, jnp.float16) and supports(96, "float16")
    assert not supports(80, jnp.float16) and not supports(64, jnp.float32) and not supports(64, jnp.bfloat16)
    assert launch.device_capability() == 75  # no GPU here


@pytest.fixture(scope="module")
def t4s() -> list[jax.Device]:
    """Two T4s that are not here; skip where this machine cannot compile for them."""
    from jgpt.errors import UserError
    from jgpt.planning.devices import compile_only

    try:
        check()
        devices = compile_only("t4x2").devices
        one = jax.ShapeDtypeStruct((2, 4), jnp.float32)
        jax.pmap(lambda x: x + 1, devices=devices).lower(one).compile()
    except (UserError, FlashUnavailable, jax.errors.JaxRuntimeError) as error:
        pytest.skip(str(error).splitlines()[0])
    return devices


def test_it_compiles_for_two_t4s_with_no_copy(t4s: list[jax.Device]):
    """A product, attention that is recomputed, and their gradients, under pmap: nothing is moved between kernels."""
    B, T, K, G, H, D = 8, 1024, 4, 3, 64, 768

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        qkv = (x @ w).reshape(B, T, K, G + 2, H)
        out = jax.checkpoint(lambda y: flash_qkv(y, capability=75))(qkv)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    w = jax.ShapeDtypeStruct((D, K * (G + 2) * H), jnp.float16)
    x = jax.ShapeDtypeStruct((2, B, T, D), jnp.float16)
    compiled = jax.pmap(jax.grad(loss), in_axes=(None, 0), devices=t4s).lower(w, x).compile()
    text = compiled.as_text()
    calls = re.findall(r'custom_call_target="triton_kernel_call"', text)
    assert len(calls) == 4  # forward, forward again, and two backward
    assert not re.findall(r" = f16\[8,1024,4,\d,64\]\S* (?:copy|transpose|concatenate|pad|slice)\(", text)
    assert "1024,1024]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 150 << 20


@pytest.mark.parametrize("group", [2, 1])
def test_two_t4s_share_the_heads_or_the_sequences_and_nothing_moves(t4s: list[jax.Device], group: int):
    """Under jit over a mesh, as execution.parallel=tensor runs it: each card launches for what it has."""
    strategy = TensorParallel(t4s, for_devices(ModelConfig(64, 1024, 1, 8, 2, 512, 64, 512), group), group)
    own = NamedSharding(strategy._mesh, PartitionSpec("data", None, "tensor"))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attend = strategy.split_attention(lambda *x: flash(*x, capability=75))
        return jnp.sum(attend(q, k, v, None).astype(jnp.float32))

    shapes = [(4, 1024, 2, 4, 64), (4, 1024, 2, 64), (4, 1024, 2, 64)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float16, sharding=own) for shape in shapes]
    text = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=own).lower(*arrays).compile().as_text()
    assert len(re.findall(r'custom_call_target="triton_kernel_call"', text)) == 3
    batch, heads = (4, 1) if group == 2 else (2, 2)
    assert f"f16[{batch},1024,{heads},4,64]" in text and "f16[4,1024,2,4,64]" not in text
    assert not re.findall(r" (?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text)
