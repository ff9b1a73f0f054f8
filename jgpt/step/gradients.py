"""Gradients: their mean over micro-batches on a device, then their average over the devices.

In the data path: inside the train step, between the loss and the optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgpt.data.batches import Batch
from jgpt.step.muon import Share, alone

Cast = Callable[[Any], Any]  # parameters in, those that the step computes with out: the matrices in another dtype
Gather = Callable[[Any, Cast], Any]  # a device's part of the parameters in, all of them out, cast


def all_here(params: Any, cast: Cast) -> Any:
    """Cast parameters, all of which are on this device: the `Gather` of one device."""
    return cast(params)


class Exchange(NamedTuple):
    """What a device exchanges with the others that share a batch, and which of them it is. Alone: nothing."""

    average: Callable[[Any], Any] = lambda tree: tree  # gradients in, their averages out; each device may keep a part
    gather: Gather = all_here
    gathers_each: bool = False  # for each micro-batch, which scatters the gradients; else once a step
    device: Any = 0  # its index
    share: Share = alone  # how they share the optimizer's work on matrices: each computes some, and gets all


def mean_gradient(
    scaled_gradient: Callable[[Batch, Array], tuple[Any, Array]],
    like: Any,
    batch: Batch,
    scale: Array,
    accumulation: int,
) -> tuple[Any, Array]:
    """Return the mean gradient of A micro-batches, fp32 and without the loss scale, and their losses fp32 [A].

    `scaled_gradient(micro_batch, index)` gives the gradient of `scale` times the loss, and the loss. `like` is a tree
    of the gradient's shapes. The micro-batches of `batch` [A, B, ...] run one after another.

    `optax.microbatching` (0.2.8) loops over plain functions of a batch. It gives no index, which dropout needs, and
    sums before it divides.
    """
    # MultiSteps keeps the running mean of what it is given, and after `every_k_schedule` gradients hands it out and
    # starts again from zero. One more than A is asked for, so it never does, and its state holds the mean at the end.
    running_mean = optax.MultiSteps(optax.identity(), every_k_schedule=accumulation + 1)

    def add(mean: optax.MultiStepsState, x: tuple[Batch, Array]) -> tuple[Any, Array]:
        gradient, loss = scaled_gradient(*x)
        with jax.named_scope("accumulate"):
            gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, gradient)
            _, mean = running_mean.update(gradient, mean)
        return mean, loss

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    mean, losses = jax.lax.scan(add, running_mean.init(zeros), (batch, jnp.arange(accumulation)))
    return mean.acc_grads, losses


def average_gradients(
    average: Callable[[Any], Any], gradient: Any, loss: Array, scale: Array, narrow: bool
) -> tuple[Any, Array]:
    """Average gradient and loss over the devices, in one exchange.

    `narrow` sends the gradient as fp16, half the bytes: with the loss scale on it, at which fp16 has held the gradients
    of every micro-batch.
    """
    if narrow:
        gradient = jax.tree.map(lambda g: (g * scale).astype(jnp.float16), gradient)
    gradient, loss = average((gradient, loss))
    if narrow:
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, gradient)
    return gradient, loss
