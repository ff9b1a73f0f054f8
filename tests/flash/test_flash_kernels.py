"""The CUDA kernels themselves, on an emulated GPU (emulate.h): values, gradients, races, reads and writes out of range.

What the emulated GPU finds wrong fails any of these tests, and it draws the order of threads by a seed. The differences
that were found are printed: pytest -rP tests/flash/test_flash_kernels.py.
"""

import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated import SOURCE, Emulator
from reference import Array, Attention, attention

from jgpt.model.attention.choose import attend_causally
from jgpt.model.attention.flash.shapes import KERNELS, SHAPES, WIDTHS

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu() -> Emulator:
    return Emulator()


def random_inputs(shape: tuple[int, ...], seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Return q, k, v and the output's gradient for B, T, K, G, H."""
    batch, length, groups, members, width = shape
    rng = np.random.default_rng([seed, *shape])
    q, d_out = (rng.normal(size=shape).astype(np.float16) for _ in range(2))
    k, v = (rng.normal(size=(batch, length, groups, width)).astype(np.float16) for _ in range(2))
    return q, k, v, d_out


def texts(batch: int, length: int, seed: int = 0) -> Array:
    """Return segments of about 20 positions."""
    begins = np.random.default_rng(seed).random((batch, length)) < 0.05
    return np.cumsum(begins, axis=1, dtype=np.int32)


def compare(gpu: Emulator, inputs: tuple[Array, ...], segments: Array | None = None) -> None:
    """Assert that the kernels agree with fp64, to 2 thousandths of the largest."""
    found = errors(gpu, inputs, segments)
    print("thousandths of the largest:", ", ".join(f"{name} {error:.2f}" for name, error in found.items()))
    for name, error in found.items():
        assert error < 2.0, f"{name}: {error}"


def errors(gpu: Emulator, inputs: tuple[Array, ...], segments: Array | None = None) -> dict[str, float]:
    """Return the largest difference from fp64 of each result, in thousandths of the largest number."""
    q, k, v, d_out = inputs
    out, log_sums = gpu.forward(q, k, v, segments)
    found = (out, log_sums, *gpu.backward(q, k, v, d_out, segments))
    result = {}
    for name, got, expected in zip(Attention._fields, found, attention(*inputs, segments), strict=True):
        assert np.all(np.isfinite(got)), f"{name}: not all is written, or finite"
        result[name] = 1000 * float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))
    return result


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("length", "groups", "members", "packed"),
    [
        (1, 1, 1, False),
        (16, 2, 1, False),
        (64, 1, 1, False),  # whole tiles
        (129, 1, 1, False),
        (77, 2, 2, True),
        (97, 1, 4, True),
        (200, 1, 3, False),
    ],
)
def test_values_and_gradients(gpu: Emulator, width: int, length: int, groups: int, members: int, packed: bool):
    batch = 2 if length < 100 else 1
    inputs = random_inputs((batch, length, groups, members, width))
    compare(gpu, inputs, texts(batch, length) if packed else None)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_array_of_queries_keys_and_values(gpu: Emulator, width: int):
    q, k, v, d_out = random_inputs((1, 37, 2, 2, width))
    qkv = np.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3)
    for segments in (None, texts(1, 37)):
        for got, expected in zip(gpu.forward_fused(qkv, segments), gpu.forward(q, k, v, segments), strict=True):
            np.testing.assert_array_equal(got, expected)
        d_qkv = gpu.backward_fused(qkv, d_out, segments)
        parts = d_qkv[..., :2, :], d_qkv[..., 2, :], d_qkv[..., 3, :]
        for got, expected in zip(parts, gpu.backward(q, k, v, d_out, segments), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_order_of_threads_changes_no_bit(gpu: Emulator, width: int):
    inputs = random_inputs((1, 100, 1, 1, width))
    first = gpu.backward(*inputs, seed=1)
    for seed in (2, 3):
        for got, expected in zip(gpu.backward(*inputs, seed=seed), first, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_further_from_fp64_than_what_xla_makes(gpu: Emulator, width: int):
    """In fp16 on a CPU, where XLA sums products in fp32 as well: its roundings between the products cost more."""
    q, k, v, d_out = random_inputs((1, 200, 1, 2, width))
    mask, exact, ours = jnp.tril(jnp.ones((1, 200, 200), bool)), attention(q, k, v, d_out), {}
    found = {"these kernels": (gpu.forward(q, k, v)[0], *gpu.backward(q, k, v, d_out))}
    for form in ("plain", "chunked_vjp"):
        out, pull = jax.vjp(partial(attend_causally, mask=mask, attention=form), *map(jnp.asarray, (q, k, v)))
        found[form] = (out, *pull(jnp.asarray(d_out)))
    for form, arrays in found.items():
        differences = {
            name: float(np.abs(np.asarray(got, np.float64) - getattr(exact, name)).max())
            for name, got in zip(("out", "d_q", "d_k", "d_v"), arrays, strict=True)
        }
        print(f"{form}:", ", ".join(f"{name} {difference:.4f}" for name, difference in differences.items()))
        ours = ours or differences
        assert all(ours[name] <= 1.1 * differences[name] for name in ours), (form, ours, differences)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_that_see_only_themselves(gpu: Emulator, width: int):
    """A text of one token each: all other scores of a row are masked, whole tiles of them. The output is the value."""
    q, k, v, d_out = random_inputs((1, 100, 1, 2, width))
    segments = np.arange(100, dtype=np.int32)[None]
    out, _ = gpu.forward(q, k, v, segments)
    np.testing.assert_array_equal(out, np.broadcast_to(v[:, :, :, None], out.shape))
    d_q, d_k, d_v = gpu.backward(q, k, v, d_out, segments)
    assert max(np.abs(d_q).max(), np.abs(d_k).max()) < 1e-4
    np.testing.assert_array_equal(d_v, d_out.astype(np.float32).sum(axis=3).astype(np.float16))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("every_other", [True, False])
def test_texts_that_mask_parts_of_tiles_or_whole_ones(gpu: Emulator, width: int, every_other: bool):
    """Two texts by turns; or the second behind two tiles that it must not see, whose weights must vanish.

    The scores are far below 0, as are those that the kernels give to what is masked.
    """
    q, k, v, d_out = random_inputs((1, 100, 1, 1, width))
    place = np.arange(100)[None]
    segments = (place % 2 if every_other else place >= 70).astype(np.int32)
    q[..., 0], k[..., 0] = 3 * width**0.5, k[..., 0] - 10
    found = errors(gpu, (q, k, v, d_out), segments)
    assert max(found["out"], found["log_sums"], found["d_v"]) < 2.0, found


@pytest.mark.parametrize("width", WIDTHS)
def test_small_gradients_stay(gpu: Emulator, width: int):
    """Loss scaling is there to keep them above fp16's smallest normal number, 6e-5; below, a step of it is 6e-8."""
    q, k, v, d_out = random_inputs((1, 70, 1, 1, width))
    d_out = (d_out * np.float16(2.0**-12)).astype(np.float16)
    expected = attention(q, k, v, d_out)
    for got, name in zip(gpu.backward(q, k, v, d_out), ("d_q", "d_k", "d_v"), strict=True):
        wanted = getattr(expected, name)
        assert np.abs(got - wanted).max() < max(2e-3 * np.abs(wanted).max(), 2.0**-23), name


@pytest.mark.parametrize("width", WIDTHS)
def test_scores_that_fp16_cannot_hold(gpu: Emulator, width: int):
    """About 80,000 and -80,000, times log2(e): fp32 rounds sums of that size to 1/128, so weights to 1 in 100.

    Times keys of 100 that would else cancel, gradients are coarse; all is finite.
    """
    q, k, v, d_out = random_inputs((1, 80, 1, 1, width))
    factor = (80_000 / width**0.5) ** 0.5
    signs = np.where(np.arange(80) % 3 == 1, -factor, factor)[None, :, None, None]
    q, k = (q + signs[..., None]).astype(np.float16), (k + signs).astype(np.float16)
    scores = np.einsum("BTKGH,BSKH->BTS", q.astype(float), k.astype(float)) * width**-0.5
    assert scores.max() > 65504 and scores.min() < -65504
    found = errors(gpu, (q, k, v, d_out))
    assert found["out"] < 30 and found["log_sums"] < 0.01, found


def test_the_largest_numbers_of_fp16(gpu: Emulator):
    """Scores of 3e10, which fp32 rounds to thousands: who wins is open, but nothing is NaN, and rows add up to 1."""
    q, k, _, d_out = random_inputs((1, 40, 1, 1, 64))
    q, k = (65504 * np.sign(x.astype(np.float32)) for x in (q, k))
    q[0, ::3], k[0, ::2] = 0.01, 65504
    q, k, v = q.astype(np.float16), k.astype(np.float16), np.full_like(k, 2.0, np.float16)
    out, log_sums = gpu.forward(q, k, v)
    np.testing.assert_array_equal(out, np.full_like(out, 2.0))
    assert np.isfinite(log_sums).all() and log_sums.max() > 1e9
    assert not any(np.isnan(gradient).any() for gradient in gpu.backward(q, k, v, d_out))


@pytest.mark.parametrize("slope", [0.02, 0.2, 2.0, -0.2])
def test_scores_that_grow_along_the_keys(gpu: Emulator, slope: float):
    """Each row's reference is renewed seldom, often, always, never. (Keys of 300 make d_q coarse in fp16.)"""
    q, k, v, d_out = random_inputs((1, 150, 1, 1, 32))
    q[..., 0], k[..., 0] = 32**0.5, slope * np.arange(150)[None, :, None]
    found = errors(gpu, (q, k, v, d_out))
    assert max(found["out"], found["log_sums"], found["d_v"]) < 2.0, found


def test_all_scores_equal(gpu: Emulator):
    q, k, v, d_out = random_inputs((1, 90, 1, 1, 64))
    compare(gpu, (np.zeros_like(q), k, v, d_out))


def test_gradients_of_large_values_are_infinite_not_wrong(gpu: Emulator):
    """A gradient that fp16 cannot hold must be infinite or NaN, so that loss scaling sees it."""
    q, k, v, d_out = random_inputs((1, 40, 1, 1, 32))
    huge = (3000 * v.astype(np.float32)).astype(np.float16), (3000 * d_out.astype(np.float32)).astype(np.float16)
    d_q = gpu.backward(q, k, *huge)[0].astype(np.float64)
    expected = attention(q, k, *huge).d_q
    assert not np.any(np.isfinite(d_q) & (np.abs(expected) > 1.1 * 65504))
    assert np.any(np.abs(expected) > 65504)


def test_what_a_query_must_not_see_changes_nothing(gpu: Emulator):
    """Later keys, and keys of other texts, may be anything: not a bit of the output or of d_q changes."""
    q, k, v, d_out = random_inputs((1, 100, 1, 1, 64))
    segments = np.where(np.arange(100) < 37, 5, 2).astype(np.int32)[None]
    other_k, other_v = k.copy(), v.copy()
    other_k[0, 60:], other_v[0, 60:] = 7, -9
    other_k[0, :37], other_v[0, :37] = 3, 11
    for form in (gpu.forward, lambda q, k, v, s: (gpu.backward(q, k, v, d_out, s)[0],)):
        for got, expected in zip(form(q, other_k, other_v, segments), form(q, k, v, segments), strict=True):
            axis = got.ndim - 1 if got.dtype == np.float32 else 1
            np.testing.assert_array_equal(np.take(got, range(37, 60), axis), np.take(expected, range(37, 60), axis))


def test_a_missing_barrier_is_found(tmp_path: Path):
    """The emulated GPU is no proof unless it sees a race: take the barrier out of each kernel's loop."""
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("ptx", "*.py", "__pycache__"))
    for kernel in KERNELS:
        text = (source / f"{kernel}.cu").read_text()
        before, first, second = text.split("barrier();")
        (source / f"{kernel}.cu").write_text(f"{before}barrier();{first}{second}")
    gpu = Emulator(source)
    q, k, v, d_out = random_inputs((1, 300, 1, 1, 32))
    dims, numbers = (1, 300, 1, 1, 32, False), [np.zeros((1, 1, 300), np.float32) for _ in range(2)]
    segments, results = np.zeros((1, 300), np.int32), [np.zeros_like(x) for x in (q, k, v)]
    arrays = {
        "forward": [q, k, v, segments, results[0], numbers[0]],
        "backward_q": [q, k, v, q, d_out, numbers[0], segments, results[0], numbers[1]],
        "backward_kv": [q, k, v, d_out, *numbers, segments, *results[1:]],
    }
    for kernel in KERNELS:
        with pytest.raises(RuntimeError, match="race|read before"):
            gpu.run(kernel, arrays[kernel], 2, dims, False, seed=1)


def test_a_place_out_of_range_is_found(gpu: Emulator):
    q, k, v, _ = random_inputs((1, 70, 1, 1, 32))
    with pytest.raises(RuntimeError, match="read out of range"):
        gpu.forward(q, k[:, :60].copy(), v)


def test_blocks_fit_a_t4():
    for (kernel, width), shape in SHAPES.items():
        assert shape.shared_bytes(kernel, width) * shape.blocks <= 64 << 10, (kernel, width)
