"""The choice of dtypes for every kind of device, and what the policy casts."""

import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.model.precision import DTYPES, Policy, choose_policy

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
