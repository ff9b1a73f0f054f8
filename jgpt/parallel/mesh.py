"""How the optimizer step runs on several devices that share one model, for LoRA on a base too large for one of them.

In the data path: in the place of `parallel/replicate.py`, with the same methods.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.data.batches import Batch
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.rules import device_mesh, param_shardings, place
from jgpt.step.eval_step import EvalStep
from jgpt.step.state import TrainState
from jgpt.step.train_step import Numbers, Step, TrainStep


class TensorParallel:
    """Run a step on several devices: the frozen parameters split over them, the state and the whole batch on each.

    `config` is what `for_devices` made; the model that the step was made with has it, too.
    """

    shares = 1  # parts that a batch is divided into

    def __init__(self, devices: Sequence[jax.Device], config: ModelConfig) -> None:
        self.devices, self._config = list(devices), config
        self._mesh = device_mesh(self.devices)
        self._copied = NamedSharding(self._mesh, PartitionSpec())

    def train_step(self, step: Step) -> TrainStep:
        """Compile (state, frozen, batch [1, A, B, ...]) -> (state, metrics); the state's memory is reused."""

        def on_all(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Numbers]:
            # Whole gradients, before the optimizer: else each device updates its part, and exchanges moments as well.
            whole = partial(jax.lax.with_sharding_constraint, shardings=self._copied)
            return step(state, frozen, _only(batch), whole, 0)

        return jax.jit(on_all, donate_argnums=0, out_shardings=self._copied)

    def eval_step(self, step: EvalStep) -> EvalStep:
        """Compile (params, frozen, batch [1, B, ...]) -> the loss summed over the batch."""
        return jax.jit(lambda params, frozen, batch: step(params, frozen, _only(batch)), out_shardings=self._copied)

    def abstract(self, state: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, Batch]:
        """Return shapes of the train step's arguments as they will lie on the devices, for compiling ahead."""

        def lying(x: jax.ShapeDtypeStruct, sharding: NamedSharding = self._copied) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        split = jax.tree.map(lying, frozen, param_shardings(frozen, self._config, self._mesh))
        return jax.tree.map(lying, state), split, jax.tree.map(lying, batch)

    def place_state(self, state: Any) -> Any:
        """Copy a state (or adapters) to every device, laid out as the step returns it (else it compiles twice)."""
        return jax.device_put(state, self._copied)

    def place_param(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Split one frozen parameter of the plain model over the devices; `path` is its keys in the tree."""
        return place(path, array, self._config, self._mesh)

    def place_batch(self, batch: Batch) -> Batch:
        """Copy a host batch [1, ...] to every device."""
        return jax.device_put(batch, self._copied)

    def on_first(self, tree: Any) -> Any:
        """Return the tree as it is: it goes with the frozen parameters, which no device holds alone."""
        return tree

    def on_host(self, tree: Any) -> Any:
        """Fetch a tree as numpy arrays (views of the device's memory on CPU)."""
        return jax.tree.map(np.asarray, tree)


def _only(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: x[0], batch)
