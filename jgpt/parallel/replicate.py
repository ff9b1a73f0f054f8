"""Replicate: a copy of the state on each device, a share of the batch on each. The only file that knows pmap.

In the data path: it runs the step of `step/` on devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.data.batches import Batch
from jgpt.step.eval_step import EvalStep
from jgpt.step.state import TrainState
from jgpt.step.train_step import Numbers, Step, TrainStep


class Pmap:
    """Run a step on several devices: the state copied to each, a share of the batch on each."""

    AXIS = "devices"

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)
        self.shares = len(self.devices)  # parts that a batch is divided into
        mesh = Mesh(np.array(self.devices), (self.AXIS,))
        self._copied = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(self.AXIS))

    def train_step(self, step: Step) -> TrainStep:
        """Compile (state, frozen, batch [devices, A, B, ...]) -> (state, metrics); the state's memory is reused."""

        def on_one_device(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Numbers]:
            return step(state, frozen, batch, self._average, jax.lax.axis_index(self.AXIS))

        return jax.pmap(
            on_one_device,
            axis_name=self.AXIS,
            devices=self.devices,
            in_axes=(None, None, 0),
            out_axes=(None, None),
            donate_argnums=0,
        )

    def _average(self, tree: Any) -> Any:
        """Average over the devices, in one all-reduce for each dtype: XLA itself would make one for every 30 MB.

        Each share is divided before it is added, so that fp16 holds the sum.
        """
        if self.shares == 1:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
            places = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
            flat = jnp.concatenate([leaves[i].reshape(-1) for i in places])
            flat = jax.lax.psum(flat / self.shares, self.AXIS)
            ends = np.cumsum([leaves[i].size for i in places])
            for i, part in zip(places, jnp.split(flat, ends[:-1]), strict=True):
                leaves[i] = part.reshape(leaves[i].shape)
        return jax.tree.unflatten(structure, leaves)

    def eval_step(self, step: EvalStep) -> EvalStep:
        """Compile (params, frozen, batch [devices, B, ...]) -> the loss summed over all devices."""

        def on_one_device(params: Any, frozen: Any, batch: Batch) -> Array:
            return jax.lax.psum(step(params, frozen, batch), self.AXIS)

        return jax.pmap(
            on_one_device, axis_name=self.AXIS, devices=self.devices, in_axes=(None, None, 0), out_axes=None
        )

    def abstract(self, state: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, Batch]:
        """Return shapes of the train step's arguments as they will lie on the devices, for compiling ahead."""
        return state, frozen, batch

    def place_state(self, state: Any) -> Any:
        """Copy a state (or parameters) to every device, laid out as the step returns it (else it compiles twice)."""
        return jax.device_put(state, self._copied)

    def place_param(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Copy one frozen parameter to every device; `path` is its keys in the tree."""
        return self.place_state(array)

    def place_batch(self, batch: Batch) -> Batch:
        """Split a host batch [devices, ...] over the devices, one row each."""
        return jax.device_put(batch, self._split)

    def on_first(self, tree: Any) -> Any:
        """Return the first device's copy of a tree that is the same on every device; nothing moves."""
        return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)

    def on_host(self, tree: Any) -> Any:
        """Fetch a tree that is the same on every device as numpy arrays (views of the device's memory on CPU)."""
        return jax.tree.map(np.asarray, self.on_first(tree))
