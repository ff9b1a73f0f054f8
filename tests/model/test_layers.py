"""Products and lookups of one row, which take another way than those of several, against the several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.model.layers import Embedding, product, product_of_transposed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("output", [jnp.float16, jnp.float32])
def test_one_row_is_multiplied_as_among_others(transposed: bool, output: jnp.dtype):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(3, 24)), jnp.float16)
    kernel = jnp.asarray(random.normal(size=(5, 2, 24) if transposed else (24, 5, 2)), jnp.float16)
    among = product(x, kernel, transposed=transposed, output_dtype=output)
    alone = product(x[1:2], kernel, transposed=transposed, output_dtype=output)
    assert alone.shape == (1, 5, 2) and alone.dtype == among.dtype == output
    np.testing.assert_allclose(alone[0], among[1], rtol=2e-3 if output == jnp.float16 else 1e-5, atol=1e-3)
    exact = np.tensordot(np.float64(x[1]), np.float64(kernel), (0, 2 if transposed else 0))
    np.testing.assert_allclose(alone[0], exact, rtol=1e-3 if output == jnp.float16 else 1e-5, atol=2e-3)


def test_a_wide_product_has_the_gradients_of_the_plain_one():
    """The same for one row as for several: of the operands' dtype, the cotangent rounded to it."""
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(6, 4)), jnp.float16)
    for rows in (1, 3):
        x = jnp.asarray(random.normal(size=(rows, 4)), jnp.float16)
        cotangent = jnp.asarray(random.normal(size=(rows, 6)), jnp.float32)
        _, backward = jax.vjp(partial(product, transposed=True, output_dtype=jnp.float32), x, kernel)
        d_x, d_kernel = backward(cotangent)
        assert d_x.dtype == d_kernel.dtype == jnp.float16
        np.testing.assert_allclose(d_x, np.float32(cotangent) @ np.float32(kernel), rtol=5e-3, atol=5e-3)
        np.testing.assert_allclose(d_kernel, np.float32(cotangent).T @ np.float32(x), rtol=5e-3, atol=5e-3)


def test_one_id_is_looked_up_as_among_others():
    table = Embedding(5, 3, 0.02)
    ids = jnp.array([[4, 0, 3]])
    params = table.init(jax.random.key(0), ids)
    rows = params["params"]["embedding"]
    assert np.array_equal(table.apply(params, ids)[0], rows[jnp.array([4, 0, 3])])
    assert np.array_equal(table.apply(params, ids[:, 2:]), rows[3][None, None])


@pytest.mark.parametrize("rows", [1, 7, 12, 64])  # whether or not they can be split
def test_a_product_of_bf16_is_computed_in_the_order_that_a_cpu_has_in_bf16(rows: int):
    """Its value is that of any order, and XLA converts no operand to fp32."""
    random = np.random.default_rng(0)
    left, right = (jnp.asarray(random.normal(size=(rows, n)), jnp.bfloat16) for n in (24, 40))
    multiply = jax.jit(partial(product_of_transposed, output_dtype=jnp.float32))
    exact = np.asarray(left, np.float64).T @ np.asarray(right, np.float64)
    np.testing.assert_allclose(multiply(left, right), exact, atol=1e-4, rtol=1e-4)
    program = multiply.lower(left, right).as_text()
    assert "tensor<24x" in program.split("dot_general")[1].split("->")[0], program  # [K, ...], not [M, K]
