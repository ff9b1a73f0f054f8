"""What every way to run a step on devices can do: the Protocol of `Replicate`, `FullySharded` and `TensorParallel`.

In the data path: between the pure step of `step/` and the devices. Who trains, evaluates, restores or plans asks the
strategy, and not `execution.parallel`.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from jgpt.data.batches import Batch
from jgpt.model.gpt import GPT
from jgpt.model.precision import Policy
from jgpt.parallel.hosts import n_processes
from jgpt.step.eval_step import EvalStep
from jgpt.step.gradients import Cast
from jgpt.step.train_step import Step, TrainStep


class Strategy(Protocol):
    """How a step runs on devices: what lies where, and how many of them share a batch."""

    @property
    def devices(self) -> list[jax.Device]:
        """The devices of all processes, in the order of the batch's shares."""
        ...

    @property
    def decodes_alone(self) -> bool:
        """Whether one device decodes with what `for_decoding` returns; else all of them do, in all processes."""
        ...

    @property
    def shares(self) -> int:
        """How many equal parts a batch is divided into: one for each device that has sequences of its own."""
        ...

    def model_for_step(self, model: GPT, policy: Policy) -> GPT:
        """Return the model as the step runs it: with what its blocks exchange between the devices."""
        ...

    def train_step(self, step: Step) -> TrainStep:
        """Compile (state, frozen, batch as `place_batch` lays it out) -> (state, metrics).

        The memory of the state is used again for the next one.
        """
        ...

    def eval_step(self, step: EvalStep) -> EvalStep:
        """Compile (params, frozen, batch as `place_sequences` lays it out) -> the loss summed over all sequences."""
        ...

    def lower(self, step: TrainStep, state: Any, frozen: Any, batch: Batch, accumulation: int) -> jax.stages.Lowered:
        """Trace a train step from shapes alone; `batch` is that of all devices, [G, ...]."""
        ...

    def place_state(self, state: Any) -> Any:
        """Put a state, or a part of one, on the devices, laid out as the step returns it (else it compiles twice)."""
        ...

    def shardings(self, state: Any) -> Any:
        """Return where each array of a state (or of its shapes) lies, as `place_state` puts it: for restoring it."""
        ...

    def place_param(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Put one frozen parameter of the plain model on the devices; `path` is its keys in the tree."""
        ...

    def own_rows(self, n: int) -> slice:
        """Return which sequences of a batch of `n` this process brings: all of them, where it is the only one."""
        ...

    def place_batch(self, batch: Batch, accumulation: int) -> Batch:
        """Put `own_rows` of a batch on the devices: each gets its share, cut into `accumulation` micro-batches."""
        ...

    def place_sequences(self, batch: Batch) -> Batch:
        """Put `own_rows` of a batch on the devices for an evaluation step: each gets its share, in one piece."""
        ...

    def bytes_per_device(self, state: Any, frozen: Any) -> int:
        """Return the bytes that a device holds of a state and of frozen parameters (arrays or their shapes)."""
        ...

    def params_in_loop(self, params: Any, cast: Cast) -> Any:
        """Return the shapes of the parameters that a device has in the loop over micro-batches."""
        ...

    def for_decoding(self, tree: Any) -> Any:
        """Return parameters as decoding takes them. All processes call it, as it may gather them."""
        ...

    def to_inspect(self, tree: Any) -> Any:
        """Return the arrays of a state for a computation over all their values: nothing moves, nothing is copied."""
        ...

    def to_save(self, state: Any) -> Any:
        """Return what a checkpoint is written from: arrays that the next step does not overwrite."""
        ...

    def on_host(self, tree: Any) -> Any:
        """Fetch a tree that is the same on every device as numpy arrays (views of the device's memory on CPU)."""
        ...


def laid_out(batch: Batch, *lead: int) -> Batch:
    """Cut the sequences of a batch [G, ...] into [*lead, G / product of lead, ...]; of arrays, or of their shapes."""

    def cut(x: Any) -> Any:
        shape = (*lead, x.shape[0] // prod(lead), *x.shape[1:])
        return jax.ShapeDtypeStruct(shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.reshape(shape)

    return jax.tree.map(cut, batch)


def own_rows(devices: Sequence[jax.Device], n: int) -> slice:
    """Return which rows of a batch of `n` go to the devices of this process, which are neighbors in `devices`."""
    if n_processes() == 1:
        return slice(0, n)
    own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
    each = n // len(devices)
    return slice(own[0] * each, (own[-1] + 1) * each)


def put(array: Any, sharding: NamedSharding) -> Array:
    """Put an array, of which every process has all, on the devices; no process waits for another.

    `jax.device_put` would compare the processes' arrays, in a collective of its own.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def put_rows(array: Any, sharding: NamedSharding, shares: int) -> Array:
    """Put this process's part [own shares, ...] of an array [shares, ...] on its devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_process_local_data(sharding, array, (shares, *array.shape[1:]))


def saved_from(tree: Any, device: jax.Device) -> Any:
    """Return arrays that Orbax may write in the background while the next step reuses the memory of `tree`.

    On CPU Orbax would write from that very memory, so this copies it; elsewhere Orbax itself copies it to the host
    before its `save` returns. Of several processes each writes its part, so that the arrays stay on the devices.
    """
    if device.platform != "cpu":
        return tree
    return jax.tree.map(np.array if n_processes() == 1 else jnp.copy, tree)
