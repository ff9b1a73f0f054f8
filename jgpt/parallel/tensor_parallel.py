"""TensorParallel: one model over a mesh of devices, for LoRA on a base that is too large for one of them.

In the data path: it runs the step of `step/` on devices, as `replicate.py` does; XLA puts in the collectives.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.data.batches import Batch
from jgpt.model.attention.choose import Attend
from jgpt.model.gpt import GPT
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.rules import DATA, TENSOR, device_mesh, param_shardings, place, split_bytes
from jgpt.parallel.strategy import laid_out, put, saved_from
from jgpt.step.eval_step import EvalStep
from jgpt.step.gradients import Cast, Exchange
from jgpt.step.state import TrainState, tree_bytes
from jgpt.step.train_step import Numbers, Step, TrainStep


class TensorParallel:
    """Run a step on several devices: the frozen parameters split over each group of them, the state on each device.

    A `Strategy`. The `group` devices of a group (0: all) work on the same sequences together. `config` is what
    `for_devices` made of the model for them; the model that the step was made with has it, too.

    `FullySharded` is another class because its step is another: there each device runs alone and names what it
    exchanges, here XLA finds the exchanges in the placement of the parameters, between the two halves of a layer.
    """

    decodes_alone = False

    def __init__(self, devices: Sequence[jax.Device], config: ModelConfig, group: int = 0) -> None:
        self.devices, self._config = list(devices), config
        self._mesh = device_mesh(self.devices, group)
        self.shares = self._mesh.shape[DATA]
        self._copied = NamedSharding(self._mesh, PartitionSpec())
        self._batch = NamedSharding(self._mesh, PartitionSpec(None, DATA))  # [A, shares * B, ...]
        self._sequences = NamedSharding(self._mesh, PartitionSpec(DATA))

    def model_for_step(self, model: GPT, policy: Policy) -> GPT:
        """Return the model with its attention split over the devices of a group."""
        return model.clone(split=self.split_attention)

    def train_step(self, step: Step) -> TrainStep:
        """Compile (state, frozen, batch [A, shares * B, ...]) -> (state, metrics); the state's memory is reused."""

        def on_all(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Numbers]:
            # Whole gradients, before the optimizer: else each device updates its part, and exchanges moments as well.
            whole = partial(jax.lax.with_sharding_constraint, shardings=self._copied)
            return step(state, frozen, batch, Exchange(whole))

        return jax.jit(on_all, donate_argnums=0, out_shardings=self._copied)

    def split_attention(self, attend: Attend) -> Attend:
        """Run attention on each device, for the sequences and the key/value heads that it has anyway; nothing moves.

        The devices of a group divide the key/value heads. For kernels of our own: XLA cannot divide their work itself.
        """
        own = PartitionSpec(DATA, None, TENSOR)

        def on_all(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
            specs = (own, own, own, PartitionSpec(DATA))
            split = jax.shard_map(attend, mesh=self._mesh, in_specs=specs, out_specs=own, check_vma=False)
            return split(q, k, v, segments)

        return on_all

    def eval_step(self, step: EvalStep) -> EvalStep:
        """Compile (params, frozen, batch [shares * B, ...]) -> the loss summed over the batch."""
        return jax.jit(step, out_shardings=self._copied)

    def lower(self, step: TrainStep, state: Any, frozen: Any, batch: Batch, accumulation: int) -> jax.stages.Lowered:
        """Trace a train step from shapes alone; `batch` is that of all devices, [G, ...]."""

        def placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding = self._copied) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        split = jax.tree.map(placed, frozen, param_shardings(frozen, self._config, self._mesh))
        shares = jax.tree.map(lambda x: placed(x, self._batch), laid_out(batch, accumulation))
        return step.lower(jax.tree.map(placed, state), split, shares)  # type: ignore[attr-defined]

    def place_state(self, state: Any) -> Any:
        """Copy a state (or adapters) to every device, laid out as the step returns it (else it compiles twice)."""
        return jax.tree.map(lambda x: put(x, self._copied), state)

    def shardings(self, state: Any) -> Any:
        """Return where each array of a state lies: a copy on every device."""
        return jax.tree.map(lambda _: self._copied, state)

    def place_param(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Split one frozen parameter of the plain model over the devices; `path` is its keys in the tree."""
        return place(path, array, self._config, self._mesh)

    def own_rows(self, n: int) -> slice:
        """Return all of a batch: the devices work on the same sequences together."""
        return slice(0, n)

    def place_batch(self, batch: Batch, accumulation: int) -> Batch:
        """Put a host batch [G, ...] on the devices as [A, shares * B, ...], each group's share on all its devices."""
        return jax.tree.map(lambda x: put(x, self._batch), laid_out(batch, accumulation))

    def place_sequences(self, batch: Batch) -> Batch:
        """Put a host batch [G, ...] on the devices, each group's share on all its devices."""
        return jax.tree.map(lambda x: put(x, self._sequences), batch)

    def bytes_per_device(self, state: Any, frozen: Any) -> int:
        """Return the bytes that a device holds: all of the state, its part of the frozen parameters."""
        return tree_bytes(state) + split_bytes(frozen, param_shardings(frozen, self._config, self._mesh))

    def params_in_loop(self, params: Any, cast: Cast) -> Any:
        """Return the shapes of all parameters of the state, which are LoRA's adapters, in the compute dtype."""
        return jax.eval_shape(cast, params)

    def for_decoding(self, tree: Any) -> Any:
        """Return the tree as it is: it goes with the frozen parameters, which no device holds alone."""
        return tree

    def to_inspect(self, tree: Any) -> Any:
        """Return the tree as it is."""
        return tree

    def to_save(self, state: Any) -> Any:
        """Return what a checkpoint is written from: arrays that the next step does not overwrite."""
        return saved_from(state, self.devices[0])

    def on_host(self, tree: Any) -> Any:
        """Fetch a tree that is the same on every device as numpy arrays (views of the device's memory on CPU)."""
        return jax.tree.map(np.asarray, tree)
