"""The CUDA kernels themselves, on an emulated GPU (emulate.h): values, gradients, races, reads and writes out of range.

What the emulated GPU finds wrong fails any of these tests, and it draws the order of threads by a seed.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from emulated import SOURCE, Emulator, build
from reference import Array, Attention, attention

from jgpt.model.attention.flash.shapes import KERNELS, SHAPES, WIDTHS

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return build(tmp_path_factory.mktemp("emulated"))


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
    for name, error in errors(gpu, inputs, segments).items():
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
    [(1, 1, 1, False), (16, 2, 1, False), (129, 1, 1, False), (77, 2, 2, True), (200, 1, 3, False)],
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
    gpu = build(tmp_path, source, widths=(32,))
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
