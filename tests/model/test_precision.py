"""The choice of dtypes for every kind of device, and what the policy casts."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_model import GPT2, LLAMA, QWEN, TOKENS, params

from jgpt.errors import UserError
from jgpt.model.gpt import GPT
from jgpt.model.precision import DTYPES, Policy, choose_policy
from jgpt.model.shapes import ModelConfig

T4, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)
DEVICES = [("cpu", None), ("gpu", T4), ("gpu", AMPERE), ("gpu", HOPPER), ("tpu", None)]
AUTO = dict(zip(DEVICES, ("fp32", "fp16", "bf16", "bf16", "bf16"), strict=True))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("compute", ["auto", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("params", DTYPES)
def test_choice(compute: str, params: str, device: tuple):
    if compute == "bf16" and device[1] == T4:
        with pytest.raises(UserError, match=r"7\.5.*no bf16 units.*'auto', 'fp16', 'fp32'.*compute=auto"):
            choose_policy(compute, params, *device)
        return
    if compute == "fp16" and device[0] == "tpu":
        with pytest.raises(UserError, match=r"on a TPU.*'auto', 'bf16', 'fp32'"):
            choose_policy(compute, params, *device)
        return
    chosen = AUTO[device] if compute == "auto" else compute
    policy = choose_policy(compute, params, *device)
    wide = device == ("cpu", None) and chosen == "bf16"
    assert policy == Policy(DTYPES[params], DTYPES[chosen], jnp.float32 if wide else None)
    assert policy.scales_loss == (chosen == "fp16")


@pytest.mark.parametrize("capability", [(3, 7), (6, 0), (7, 0), (7, 5)])
def test_bf16_is_refused_on_every_gpu_before_ampere(capability: tuple[int, int]):
    with pytest.raises(UserError, match=f"compute capability {capability[0]}.{capability[1]}"):
        choose_policy("bf16", "fp32", "gpu", capability)


@pytest.mark.parametrize("compute", DTYPES)
def test_cast_leaves_vectors_alone(compute: str):
    params = {"kernel": np.full((2, 3), 1.001, np.float32), "table": np.ones((2, 2, 2), np.float32)}
    params |= {"scale": np.full(3, 1.001, np.float32), "number": np.float32(1.001)}
    params = {name: jnp.asarray(value) for name, value in params.items()}
    cast = Policy(compute=DTYPES[compute]).cast_to_compute(params)
    assert cast["kernel"].dtype == cast["table"].dtype == DTYPES[compute]
    assert cast["scale"] is params["scale"] and cast["number"] is params["number"]
    np.testing.assert_array_equal(cast["kernel"], params["kernel"].astype(DTYPES[compute]))


def test_cast_takes_half_precision_vectors_as_they_are():
    vector = jnp.ones(3, jnp.float16)
    assert Policy(jnp.float16, jnp.float16).cast_to_compute({"bias": vector})["bias"] is vector


def operations(jaxpr: Any) -> Iterator[Any]:
    """Yield the operations of a program and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else (value,):  # the branches of a choice
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN], ids=["gpt2", "llama", "qwen"])
def test_on_a_cpu_bf16_is_for_products_alone(config: ModelConfig):
    """The kernels' products, forward and backward, take bf16 and give fp32; nothing else is computed in bf16."""
    policy = choose_policy("bf16", "fp32", "cpu", None)
    model = GPT(config, policy.compute, activations=policy.activations)

    def loss(tree: Any) -> jax.Array:
        hidden = model.apply({"params": policy.cast_to_compute(tree)}, TOKENS).hidden
        return jnp.vdot(hidden, jnp.asarray(np.random.default_rng(2).normal(size=hidden.shape), jnp.float32))

    found = list(operations(jax.make_jaxpr(jax.grad(loss))(params(config)).jaxpr))
    products = [equation for equation in found if equation.primitive.name == "dot_general"]
    narrow = [p for p in products if {var.aval.dtype for var in p.invars} == {jnp.dtype(jnp.bfloat16)}]
    # Forward, the input's gradient, and the kernel's in two forms, one for CPUs: see `product_of_transposed`.
    assert len(narrow) == 4 * 4 * config.n_layers and all(p.outvars[0].aval.dtype == jnp.float32 for p in narrow)
    assert all(var.aval.dtype == jnp.float32 for p in products if p not in narrow for var in p.invars)
    arithmetic = {"mul", "sub", "div", "exp", "tanh", "logistic", "rsqrt", "reduce_sum", "max"}
    in_bf16 = {e.primitive.name for e in found if any(var.aval.dtype == jnp.bfloat16 for var in e.outvars)}
    assert not in_bf16 & arithmetic
    exact = jax.jit(jax.grad(lambda tree: loss_in_fp32(config, tree)))(params(config))
    difference = jax.tree.map(jnp.subtract, exact, jax.jit(jax.grad(loss))(params(config)))
    assert float(optax.tree.norm(difference)) < 0.05 * float(optax.tree.norm(exact))


def loss_in_fp32(config: ModelConfig, tree: Any) -> jax.Array:
    hidden = GPT(config).apply({"params": tree}, TOKENS).hidden
    return jnp.vdot(hidden, jnp.asarray(np.random.default_rng(2).normal(size=hidden.shape), jnp.float32))
