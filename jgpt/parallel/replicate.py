"""Replicate: a copy of the state on each device, a share of the batch on each. The only file that knows pmap.

In the data path: it runs the step of `step/` on devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.data.batches import Batch
from jgpt.model.gpt import GPT
from jgpt.model.precision import Policy
from jgpt.parallel.hosts import n_processes, own_devices
from jgpt.parallel.strategy import laid_out, own_rows, saved_from
from jgpt.step.eval_step import EvalStep
from jgpt.step.gradients import Cast, Exchange
from jgpt.step.state import TrainState, tree_bytes
from jgpt.step.train_step import Numbers, Step, TrainStep


class Replicate:
    """Run a step on several devices: the state copied to each, a share of the batch on each. A `Strategy`.

    Of several processes each has arrays of its own devices alone, which is what pmap takes and returns; only what a
    checkpoint is written from are arrays of all devices.
    """

    AXIS = "devices"
    decodes_alone = True

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)
        self.shares = len(self.devices)
        self._own = own_devices(self.devices) if n_processes() > 1 else self.devices
        mesh = Mesh(np.array(self._own), (self.AXIS,))
        self._copied = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(self.AXIS))
        self._copied_to_all = NamedSharding(Mesh(np.array(self.devices), (self.AXIS,)), PartitionSpec())

    def model_for_step(self, model: GPT, policy: Policy) -> GPT:
        """Return the model as it is: each device runs it alone."""
        return model

    def train_step(self, step: Step) -> TrainStep:
        """Compile (state, frozen, batch [shares, A, B, ...]) -> (state, metrics); the state's memory is reused."""

        def on_one_device(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Numbers]:
            exchange = Exchange(self._average, device=jax.lax.axis_index(self.AXIS), share=self._share)
            return step(state, frozen, batch, exchange)

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

    def _share(self, function: Callable[[Array], Array], matrices: Array) -> Array:
        """Apply a function to independent matrices [n, ...], an equal number on each device; all get all results."""
        if self.shares == 1:
            return function(matrices)
        each = -(-len(matrices) // self.shares)
        padded = jnp.pad(matrices, ((0, each * self.shares - len(matrices)), (0, 0), (0, 0)))
        mine = jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(self.AXIS) * each, each)
        return jax.lax.all_gather(function(mine), self.AXIS, tiled=True)[: len(matrices)]

    def eval_step(self, step: EvalStep) -> EvalStep:
        """Compile (params, frozen, batch [shares, B, ...]) -> the loss summed over all devices."""

        def on_one_device(params: Any, frozen: Any, batch: Batch) -> Array:
            return jax.lax.psum(step(params, frozen, batch), self.AXIS)

        return jax.pmap(
            on_one_device, axis_name=self.AXIS, devices=self.devices, in_axes=(None, None, 0), out_axes=None
        )

    def lower(self, step: TrainStep, state: Any, frozen: Any, batch: Batch, accumulation: int) -> jax.stages.Lowered:
        """Trace a train step from shapes alone; `batch` is that of all devices, [G, ...]."""
        own = len(self._own) * batch.tokens.shape[0] // self.shares
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((own, *x.shape[1:]), x.dtype), batch)
        return step.lower(state, frozen, laid_out(batch, len(self._own), accumulation))  # type: ignore[attr-defined]

    def place_state(self, state: Any) -> Any:
        """Copy a state (or a part of one) to every device, laid out as the step returns it (else it compiles twice)."""
        return jax.device_put(state, self._copied)

    def shardings(self, state: Any) -> Any:
        """Return where each array of a state lies: a copy on every device."""
        return jax.tree.map(lambda _: self._copied, state)

    def place_param(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Copy one frozen parameter to every device; `path` is its keys in the tree."""
        return jax.device_put(array, self._copied)

    def own_rows(self, n: int) -> slice:
        """Return which sequences of a batch of `n` this process brings."""
        return own_rows(self.devices, n)

    def place_batch(self, batch: Batch, accumulation: int) -> Batch:
        """Put the own rows of a batch on the devices as [own shares, A, B, ...], a share on each."""
        return jax.device_put(laid_out(batch, len(self._own), accumulation), self._split)

    def place_sequences(self, batch: Batch) -> Batch:
        """Put the own rows of a batch on the devices as [own shares, B, ...], a share on each."""
        return jax.device_put(laid_out(batch, len(self._own)), self._split)

    def bytes_per_device(self, state: Any, frozen: Any) -> int:
        """Return the bytes that a device holds: all of the state and of the frozen parameters."""
        return tree_bytes((state, frozen))

    def params_in_loop(self, params: Any, cast: Cast) -> Any:
        """Return the shapes of all parameters in the compute dtype."""
        return jax.eval_shape(cast, params)

    def for_decoding(self, tree: Any) -> Any:
        """Return the first device's copy, with which that device decodes alone; nothing moves."""
        return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)

    def to_inspect(self, tree: Any) -> Any:
        """Return the first device's copy."""
        return self.for_decoding(tree)

    def to_save(self, state: Any) -> Any:
        """Return what a checkpoint is written from: arrays that the next step does not overwrite."""
        if n_processes() == 1:
            return saved_from(self.for_decoding(state), self.devices[0])

        def of_all_devices(x: Array) -> Array:
            copies = saved_from([shard.data for shard in x.addressable_shards], self.devices[0])
            return jax.make_array_from_single_device_arrays(x.shape, self._copied_to_all, copies)

        return jax.tree.map(of_all_devices, state)

    def on_host(self, tree: Any) -> Any:
        """Fetch a tree that is the same on every device as numpy arrays (views of the device's memory on CPU)."""
        return jax.tree.map(np.asarray, self.for_decoding(tree))
