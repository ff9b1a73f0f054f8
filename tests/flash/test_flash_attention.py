"""The JAX functions, with kernels on an emulated GPU: values, gradients, one array, remat; and the check for GPUs."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import Emulator

from jgpt.model.attention.choose import attend_causally
from jgpt.model.attention.flash import attention, flash, flash_qkv
from jgpt.model.columns import for_devices
from jgpt.model.gpt import GPT
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.tensor_parallel import TensorParallel

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("traced_alone")  # with other kernels than elsewhere


@pytest.fixture(scope="module")
def gpu() -> Emulator:
    return Emulator()


@pytest.fixture(autouse=True)
def emulated(gpu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host run what would be launched."""

    def launch(
        kernel: str, operands: Sequence[jax.Array], results: Sequence[Any], dims: tuple[int, ...], fused: bool,
        packed: bool, capability: int, aliases: dict[int, int] | None = None,
    ) -> Sequence[jax.Array]:  # fmt: skip
        def run(*arrays: Any) -> list[Any]:
            given, written = [np.array(x) for x in arrays], [np.full(r.shape, np.nan, r.dtype) for r in results]
            for operand, result in (aliases or {}).items():
                written[result] = given[operand]
            gpu.run(kernel, [*given, *written], 2, (*dims, fused), packed, seed=1)
            return written

        return jax.pure_callback(run, list(results), *operands)

    monkeypatch.setattr(attention, "launch", launch)


def inputs(shape: tuple[int, ...] = (2, 40, 2, 2, 32)) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    small = (*shape[:3], shape[4])
    return tuple(jax.random.normal(k, s, jnp.float16) for k, s in zip(keys, (shape, small, small, shape), strict=True))


def both_ways(form: Callable[..., jax.Array], *arrays: jax.Array) -> list[jax.Array]:
    out, pull = jax.vjp(form, *arrays[:-1])
    return [out, *pull(arrays[-1])]


def close(found: list[jax.Array], expected: list[jax.Array]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == jnp.float16 and got.shape == wanted.shape
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=6e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients(packed: bool):
    q, k, v, d_out = inputs()
    segments = jnp.asarray(np.arange(40) // 15, jnp.int32)[None].repeat(2, axis=0) if packed else None
    mask = jnp.tril(jnp.ones((40, 40), bool))[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    wide = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    expected = both_ways(lambda q, k, v: attend_causally(q, k, v, mask, "plain"), *wide)
    found = both_ways(lambda q, k, v: flash(q, k, v, segments, capability=75), q, k, v, d_out)
    close(found, expected)

    qkv = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=3)
    out, d_qkv = both_ways(lambda qkv: flash_qkv(qkv, segments, capability=75), qkv, d_out)
    fused = [out, d_qkv[..., :2, :], d_qkv[..., 2, :], d_qkv[..., 3, :]]
    for a, b in zip(fused, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_recomputed_in_the_backward_pass():
    q, k, v, d_out = inputs()

    def step(form: Callable[..., jax.Array]) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(form(q, k, v).astype(jnp.float32) * d_out.astype(jnp.float32))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    plain = step(lambda q, k, v: flash(q, k, v, capability=75))
    remat = step(jax.checkpoint(lambda q, k, v: flash(q, k, v, capability=75)))
    for a, b in zip(plain, remat, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_position_sees_itself():
    q, k, v, d_out = inputs((2, 1, 2, 2, 32))
    out, d_q, d_k, d_v = both_ways(lambda q, k, v: flash(q, k, v, capability=75), q, k, v, d_out)
    np.testing.assert_array_equal(out, jnp.broadcast_to(v[:, :, :, None], out.shape))
    assert jnp.abs(d_q).max() < 1e-4 and jnp.abs(d_k).max() < 1e-4
    np.testing.assert_array_equal(d_v, d_out.astype(jnp.float32).sum(axis=3).astype(jnp.float16))


@pytest.mark.parametrize("group", [2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_devices_that_share_heads_or_sequences(group: int, packed: bool):
    """execution.parallel=tensor: each device runs the kernels on its own heads, or sequences; not a bit changes."""
    q, k, v, d_out = inputs()
    segments = jnp.asarray(np.arange(40) // 15, jnp.int32)[None].repeat(2, axis=0) if packed else None
    strategy = TensorParallel(jax.local_devices(), for_devices(ModelConfig(64, 40, 1, 4, 2, 128, 32, 64), group), group)

    def steps(form: Callable[..., jax.Array]) -> list[jax.Array]:
        return jax.jit(lambda *x: both_ways(lambda q, k, v: form(q, k, v, segments), *x))(q, k, v, d_out)

    kernel = partial(flash, capability=75)
    for got, expected in zip(steps(strategy.split_attention(kernel)), steps(kernel), strict=True):
        np.testing.assert_array_equal(got, expected)
        if got.ndim == 5:
            divided = got.sharding.shard_shape(got.shape)
            assert divided[0] * divided[2] == got.shape[0] * got.shape[2] // 2


def test_a_model_whose_devices_share_the_heads():
    """The block passes what divides attention down to the kernel."""
    config = ModelConfig(64, 40, 1, 4, 2, 128, 32, 64)
    strategy, tokens = TensorParallel(jax.local_devices(), for_devices(config, 2), 2), jnp.zeros((2, 40), jnp.int32)
    alone = GPT(config, jnp.float16, attention="flash")
    params = jax.jit(alone.init)(jax.random.key(0), tokens)
    split = alone.clone(split=strategy.split_attention)
    for model, calls in ((alone, 0), (split, 1)):
        assert str(jax.make_jaxpr(model.apply)(params, tokens)).count("shard_map") == calls
    expected, found = (jax.jit(model.apply)(params, tokens).hidden for model in (alone, split))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the products around are compiled otherwise


def test_what_there_is_no_kernel_for():
    q, k, v, _ = inputs((1, 8, 1, 1, 80))
    with pytest.raises(AssertionError, match="no kernel for float16 of shape"):
        flash(q, k, v)
    q, k, v, _ = (x.astype(jnp.float32) for x in inputs())
    with pytest.raises(AssertionError, match="no kernel for float32"):
        flash(q, k, v)


@pytest.mark.slow
def test_the_check_for_a_gpu_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """All of scripts/bench/flash_check.py in miniature; cuDNN is not here, and is reported as failed."""
    import flash_check

    monkeypatch.setattr(flash_check, "VALUES", [(1, 30, 1, 2, 32, False), (1, 30, 2, 1, 32, True)] * 3)
    monkeypatch.setattr(flash_check, "SPEED", [(1, 16, 1, 1, 32)] * 4)
    monkeypatch.setattr(flash_check, "LARGEST", (1, 33, 1, 1, 32))
    monkeypatch.setattr(flash_check, "REPEATS", 1)
    monkeypatch.setattr(flash_check, "RUNS", 2)
    monkeypatch.setattr(sys, "argv", ["flash_check", "--json", str(tmp_path / "found.json"), "--budget_seconds", "600"])
    assert flash_check.main() == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert all("cudnn" in name for name in found["failed"]), found["failed"]
    assert not found["left_out"] and found["determinism"]["2 runs"]["ok"]
    flash_check.find_sanitizer = lambda: None
    monkeypatch.setattr(sys, "argv", ["flash_check", "--sanitize"])
    assert flash_check.main() == 1
