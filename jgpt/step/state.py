"""The training state: everything that the next steps depend on.

In the data path: what the step takes and returns, and what a checkpoint holds.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgpt.model.gpt import GPT
from jgpt.model.lora import init_adapters
from jgpt.model.precision import Policy


class LossScale(NamedTuple):
    """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740) and the count of the steps that it skipped."""

    scale: Array  # fp32; 1 where the policy needs none
    good_steps: Array  # int32, since the last change of scale
    skipped_steps: Array  # int32, in all
    skipped_in_a_row: Array  # int32


class TrainState(NamedTuple):
    """Everything that the next steps depend on; between steps it is the same on every device."""

    step: Array  # int32: batches consumed, skipped ones included
    updates: Array  # int32: updates made, which is where the schedule stands
    params: Any  # what is trained: all parameters, or LoRA's adapters beside frozen ones, which are not in the state
    opt_state: Any
    loss_scale: LossScale


def init_state(
    model: GPT,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    seed: int,
    loss_scale: float,
    params: Any = None,
) -> TrainState:
    """Make the state of step 0: `params`, or else new ones from `seed`, and zero moments.

    With LoRA what is trained are new adapters, in fp32, of the plain model's shapes. Pure: `jax.eval_shape` gives the
    state's shapes.
    """
    key = jax.random.key(seed)
    if model.lora is not None:
        params = init_adapters(model, key)
    else:
        params = params or model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        params = jax.tree.map(lambda x: x.astype(policy.param), params)
    zero = jnp.zeros((), jnp.int32)
    moments = optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))  # whatever the parameters' dtype
    scale = LossScale(jnp.float32(loss_scale if policy.scales_loss else 1.0), zero, zero, zero)
    return TrainState(zero, zero, params, moments, scale)


def tree_bytes(tree: Any) -> int:
    """Return the bytes of a tree of arrays, or of their shapes; of a state, the bytes of its checkpoint."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
