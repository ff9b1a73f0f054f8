"""Attention against a plain numpy form; the causal pieces against the whole; RoPE by what it must keep."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.model.attention import choose, flash
from jgpt.model.attention.choose import attend_causally, choose_attention
from jgpt.model.attention.plain import attend, attend_newest
from jgpt.model.rope import rope

B, T, K, G, H = 2, 11, 2, 3, 8

# As the model runs them. Op by op, each of their operations is compiled by itself.
compiled_attend = jax.jit(attend, static_argnames="drop")
compiled_causally = jax.jit(attend_causally, static_argnames=("attention", "drop", "scores_dtype"))
compiled_rope = jax.jit(rope, static_argnums=2)


def inputs(length: int = T, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = (B, length, K, G, H), (B, length, K, H), (B, length, K, H)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def causal(length: int):
    return jnp.tril(jnp.ones((1, length, length), bool))


def plain(q, k, v, mask) -> np.ndarray:
    """Attention of each head by itself, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, h, g in np.ndindex(q.shape[0], K, G):
        scores = q[b, :, h, g] @ k[b, :, h].T / np.sqrt(H)
        weights = np.where(np.asarray(mask)[b % len(mask)], np.exp(scores), 0)
        out[b, :, h, g] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h]
    return out


def test_attend_is_softmax_attention_for_each_head():
    q, k, v = inputs()
    random = np.random.default_rng(1).random((B, T, T)) < 0.5
    mask = jnp.asarray(random | np.eye(T, dtype=bool))
    np.testing.assert_allclose(compiled_attend(q, k, v, mask), plain(q, k, v, mask), rtol=1e-4, atol=1e-5)


def summed(form, mask, dtype=jnp.float32):
    """Return a function of q, k, v: a weighted sum of the output, and its gradients."""

    def loss(q, k, v):
        mixed = form(q, k, v, mask)
        weights = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)
        return jnp.vdot(mixed.astype(jnp.float32), weights)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def form_named(attention: str):
    return lambda q, k, v, mask: attend_causally(q, k, v, mask, attention)


@cache
def expected_for(length: int):
    return summed(attend, causal(length))(*inputs(length))


@pytest.mark.parametrize("attention", ["plain", "chunked", "chunked_vjp", "chunked_vjp_recompute"])
@pytest.mark.parametrize("length", [1, 5, 200])  # the last in chunks
def test_every_form_equals_the_whole_with_gradients(attention, length):
    results = summed(form_named(attention), causal(length))(*inputs(length))
    for a, b in zip(jax.tree.leaves(expected_for(length)), jax.tree.leaves(results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("attention", ["chunked_vjp", "chunked_vjp_recompute"])
def test_forms_of_our_own_keep_to_the_mask_of_each_row(attention):
    q, k, v = inputs(200)
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (B, 200)), axis=1)
    mask = causal(200) & jnp.asarray(segments[:, None, :] == segments[:, :, None])
    expected, results = (summed(form, mask)(q, k, v) for form in (attend, form_named(attention)))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(results), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_computing_the_weights_again_changes_no_value_and_stores_none():
    q, k, v = inputs(256)
    mask = causal(256)
    stored, again = (summed(form_named(attention), mask) for attention in ("chunked_vjp", "chunked_vjp_recompute"))
    for a, b in zip(jax.tree.leaves(stored(q, k, v)), jax.tree.leaves(again(q, k, v)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # the two compile differently

    def bytes_stored(attention: str) -> int:
        _, backward = jax.eval_shape(lambda *x: jax.vjp(lambda *y: attend_causally(*y, mask, attention), *x), q, k, v)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert bytes_stored("chunked_vjp") - bytes_stored("chunked_vjp_recompute") == 4 * B * K * G * 256 * 256 * 5 // 8


def large_inputs():
    """Scores to 40 and values to 300: an unnormalized sum of such values is beyond fp16."""
    random = np.random.default_rng(4)
    q, k, v = (jnp.asarray(x * random.choice([1, 3], x.shape), jnp.float32) for x in inputs(256))
    return q, k, 100 * v


@cache
def fp16_errors(attention: str) -> list[float]:
    """Return the relative errors of the loss and of the three gradients in fp16, against fp32."""
    exact = exact_results()
    narrow = summed(form_named(attention), causal(256))(*(x.astype(jnp.float16) for x in large_inputs()))
    pairs = zip(jax.tree.leaves(exact), jax.tree.leaves(narrow), strict=True)
    return [float(jnp.linalg.norm(a - b.astype(jnp.float32)) / jnp.linalg.norm(a)) for a, b in pairs]


@cache
def exact_results():
    return summed(attend, causal(256))(*large_inputs())


@pytest.mark.parametrize("attention", ["chunked_vjp", "chunked_vjp_recompute"])
def test_fp16_is_as_exact_as_the_form_that_jax_differentiates(attention):
    for ours, theirs in zip(fp16_errors(attention), fp16_errors("plain"), strict=True):
        assert ours < 1.5 * theirs + 1e-3


def test_auto_chooses_by_device_and_cudnn_needs_one_that_has_it():
    assert choose_attention("auto", jnp.float32, "cpu", None) == "chunked_vjp"
    assert choose_attention("auto", jnp.float16, "gpu", (7, 5)) == "chunked_vjp"
    assert choose_attention("chunked_vjp_recompute", jnp.float32, "cpu", None) == "chunked_vjp_recompute"
    for compute, platform, capability in ((jnp.float32, "gpu", (8, 0)), (jnp.float16, "cpu", None)):
        with pytest.raises(UserError, match="attention=auto"):
            choose_attention("flash", compute, platform, capability)


@pytest.mark.parametrize("launches", [True, False])
def test_flash_is_the_fused_kernel_of_the_device(launches: bool, monkeypatch: pytest.MonkeyPatch):
    """Ours in fp16 where this jaxlib can launch it, which is deterministic; else cuDNN's, which is not."""
    monkeypatch.setattr(choose, "_can_launch", lambda: launches)
    ours = "flash" if launches else "cudnn"
    half, brain = jnp.float16, jnp.bfloat16
    assert choose_attention("flash", half, "gpu", (9, 0)) == choose_attention("auto", half, "gpu", (9, 0)) == ours
    assert choose_attention("auto", brain, "gpu", (8, 0)) == choose_attention("flash", brain, "gpu", (8, 0)) == "cudnn"
    assert choose_attention("auto", brain, "gpu", (8, 0), deterministic=True) == "chunked_vjp"
    assert choose_attention("auto", half, "gpu", (7, 5)) == "chunked_vjp"  # not measured on a T4 yet
    assert choose_attention("auto", half, "gpu", (9, 0), d_head=80) == "cudnn"
    with pytest.raises(UserError, match="with execution.deterministic=False"):
        choose_attention("flash", brain, "gpu", (8, 0), deterministic=True)
    if launches:
        assert choose_attention("flash", half, "gpu", (7, 5), deterministic=True) == "flash"
    else:
        with pytest.raises(UserError, match="attention=auto"):
            choose_attention("flash", half, "gpu", (7, 5), deterministic=True)


@pytest.mark.parametrize(("compute", "d_head"), [(jnp.float16, 80), (jnp.float32, 64), (jnp.bfloat16, 64)])
def test_a_t4_has_no_kernel_for_other_heads_and_dtypes(compute, d_head: int):
    """ "flash" says so, "auto" takes another form and says nothing."""
    name = jnp.dtype(compute).name
    with pytest.raises(
        UserError, match=f"'flash' on sm_75 in {name} with heads {d_head} wide.*Allowed: fp16 and heads"
    ):
        choose_attention("flash", compute, "gpu", (7, 5), d_head=d_head)
    assert choose_attention("auto", compute, "gpu", (7, 5), d_head=d_head) == "chunked_vjp"


def test_a_jaxlib_that_cannot_launch_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A T4 then has no fused attention, a newer GPU cuDNN's; why is said once. Where nobody asks, nothing is said."""

    def unavailable() -> None:
        raise flash.FlashUnavailable("this jaxlib has no module gpu_triton (gone)")

    monkeypatch.setattr(flash, "check", unavailable)
    for known in (choose._can_launch, choose._launch_problem):
        known.cache_clear()
    try:
        assert choose_attention("auto", jnp.float16, "gpu", (7, 5)) == "chunked_vjp" and not caplog.text
        with pytest.raises(UserError, match="no module gpu_triton.*Allowed: jaxlib 0.7.2 to.*attention=auto"):
            choose_attention("flash", jnp.float16, "gpu", (7, 5))
        assert choose_attention("auto", jnp.float16, "gpu", (9, 0)) == "cudnn"
        assert choose_attention("auto", jnp.float16, "gpu", (9, 0), deterministic=True) == "chunked_vjp"
        assert caplog.text.count("our attention kernels are not used: this jaxlib has no module gpu_triton") == 1
    finally:
        for known in (choose._can_launch, choose._launch_problem):
            known.cache_clear()


def test_dropout_and_fp32_scores_take_another_form():
    """No kernel is launched for them, so this runs on a CPU."""
    q, k, v = inputs()
    expected = compiled_causally(q, k, v, causal(T), "chunked", lambda weights: 2 * weights)
    found = compiled_causally(q, k, v, causal(T), "flash", lambda weights: 2 * weights)
    np.testing.assert_array_equal(found, expected)
    found = compiled_causally(q, k, v, causal(T), "flash", scores_dtype=jnp.float32)
    np.testing.assert_array_equal(found, compiled_causally(q, k, v, causal(T), scores_dtype=jnp.float32))


def test_causal_pieces_compute_five_eighths_of_the_products():
    length = 256
    q, k, v = inputs(length)

    def flops(form) -> float:
        cost = jax.jit(form).lower(q, k, v, causal(length)).compile().cost_analysis()
        return cost["flops"]

    assert flops(attend_causally) < 0.7 * flops(attend)


def test_the_newest_token_beside_its_cache_is_the_last_query_of_the_whole():
    """Rows of several lengths; what the cache holds past them is garbage that nobody sees."""
    q, k, v = inputs()
    lengths, rows = np.array([T - 1, 4]), np.arange(B)
    seen = jnp.asarray(np.arange(T)[None, None, :] < lengths[:, None, None])
    newest = (x[rows, lengths][:, None] for x in (q, k, v))
    mixed = jax.jit(attend_newest)(*newest, k.swapaxes(1, 2), v.swapaxes(1, 2), seen)
    expected = plain(q, k, v, causal(T))[rows, lengths]
    np.testing.assert_allclose(mixed[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_query_that_may_look_nowhere_is_still_finite():
    q, k, v = inputs()
    assert np.isfinite(compiled_attend(q, k, v, jnp.zeros((1, T, T), bool))).all()


def test_fp16_products_past_the_range_of_fp16_are_scaled_before():
    _, _, v = inputs(dtype=jnp.float16)
    q, k = jnp.full((B, T, K, G, H), 130, jnp.float16), jnp.full((B, T, K, H), 130, jnp.float16)
    out = jax.jit(attend_causally)(q, k, v, causal(T))  # q . k is 135,200; fp16 ends at 65,504
    assert out.dtype == jnp.float16
    means = np.cumsum(np.asarray(v, np.float64), 1) / np.arange(1, T + 1)[:, None, None]
    np.testing.assert_allclose(out, np.repeat(means[:, :, :, None], G, 3), rtol=0.01, atol=0.01)


def test_drop_acts_on_the_normalised_weights():
    q, k, v = inputs()
    doubled = compiled_attend(q, k, v, causal(T), lambda weights: 2 * weights)
    np.testing.assert_allclose(doubled, 2 * compiled_attend(q, k, v, causal(T)), rtol=1e-5)


def test_rope_is_the_rotation_of_the_paper():
    x = np.random.default_rng(3).normal(size=(B, T, K, H)).astype(np.float32)
    positions = np.arange(T)[None]
    pairs = x[..., : H // 2] + 1j * x[..., H // 2 :]
    angles = positions[0][:, None] * 10_000.0 ** (-np.arange(H // 2) / (H // 2))
    turned = pairs * np.exp(1j * angles)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(
        compiled_rope(jnp.asarray(x), jnp.asarray(positions), 10_000.0), expected, rtol=1e-4, atol=1e-5
    )


def test_rope_makes_scores_depend_on_distance_alone():
    q, k, _ = inputs()
    here = jnp.arange(T)[None]

    @jax.jit
    def scores(shift: int):
        return jnp.einsum("BTKGH,BSKH->BKGTS", rope(q, here + shift, 10_000.0), rope(k, here + shift, 10_000.0))

    np.testing.assert_allclose(scores(0), scores(1000), atol=2e-3)


def test_rope_keeps_the_dtype_and_takes_positions_of_each_row():
    q, _, _ = inputs(dtype=jnp.float16)
    rows = jnp.stack([jnp.arange(T), jnp.arange(T) + 5])
    out = compiled_rope(q, rows, 10_000.0)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out[1:], compiled_rope(q[1:], rows[1:], 10_000.0))
    np.testing.assert_array_equal(out[:1], compiled_rope(q[:1], rows[:1], 10_000.0))
