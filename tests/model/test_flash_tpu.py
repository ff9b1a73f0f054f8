"""JAX's fused kernel for TPUs against the plain form, in the imitation of a TPU that Pallas runs on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jgpt.errors import UserError
from jgpt.model.attention.choose import attend_causally, choose_attention
from jgpt.model.attention.plain import attend

B, K, G = 1, 1, 2


def results(form, length: int, width: int, segments):
    """Return a weighted sum of the output, and its gradients by q, k and v."""
    random = np.random.default_rng(0)
    shapes = (B, length, K, G, width), (B, length, K, width), (B, length, K, width)
    q, k, v = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    weights = jnp.asarray(random.normal(size=q.shape), jnp.float32)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segments is not None:
        mask = mask & (segments[:, None, :] == segments[:, :, None])
    return jax.jit(jax.value_and_grad(lambda *x: jnp.vdot(form(*x, mask), weights), argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize(
    ("length", "width", "packed"),
    [(128, 64, False), (200, 64, True)],  # of 200 the kernel makes 256
)
def test_the_kernel_equals_the_plain_form_with_gradients(length, width, packed):
    segments = None
    if packed:
        segments = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (B, length)), axis=1), jnp.int32)
    expected = results(attend, length, width, segments)
    with pltpu.force_tpu_interpret_mode(), jax.numpy_rank_promotion("allow"):  # the kernel is JAX's own
        found = results(
            lambda q, k, v, mask: attend_causally(q, k, v, mask, "flash_tpu", segments=segments),
            length,
            width,
            segments,
        )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_flash_on_a_tpu_is_that_kernel():
    assert choose_attention("flash", jnp.bfloat16, "tpu", None, 128, deterministic=True) == "flash_tpu"
    assert choose_attention("plain", jnp.bfloat16, "tpu", None, 128) == "plain"
    assert choose_attention("auto", jnp.bfloat16, "tpu", None, 128, deterministic=True) == "flash_tpu"
    assert choose_attention("auto", jnp.bfloat16, "tpu", None, 64) == "chunked_vjp"  # half of the unit would be padding
    with pytest.raises(UserError, match=r"flash' on tpu in bfloat16 with heads 192.*multiple of 128, on a TPU"):
        choose_attention("flash", jnp.bfloat16, "tpu", None, 192)
