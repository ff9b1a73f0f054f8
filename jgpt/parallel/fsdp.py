"""FullySharded: the state split over the devices, a share of the batch on each.

In the data path: it runs the step of `step/` on devices, as `replicate.py` does. Each device keeps a part of the master
parameters and of their moments (ZeRO, Rajbhandari et al., arXiv 1910.02054). Its micro-batches need all parameters, in
the compute dtype, which come from the other devices in one of two ways:

- gather=step: all of them once a step. Each device then sums gradients alone, and receives its part of their average:
  one gather and one scatter, whatever the accumulation.
- gather=layer: those of a block whenever the block runs, forward and backward, and the block's gradients are scattered
  at once; the embeddings' once a micro-batch (FSDP, Zhao et al., arXiv 2304.11277). Nothing of the model's size is on
  one device, and much more is sent.

The gradients are computed in a `shard_map`, where nothing moves that is not written down: left to itself, XLA
exchanges gradients after each micro-batch. The update is element by element, but for a norm, and XLA divides it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.data.batches import Batch
from jgpt.model.gpt import GATHERED, GPT
from jgpt.model.parameters import abstract_params
from jgpt.model.precision import Policy
from jgpt.parallel.hosts import n_processes
from jgpt.parallel.rules import DATA, FSDP, device_mesh, split_axis, split_bytes
from jgpt.parallel.strategy import laid_out, own_rows, put, put_rows, saved_from
from jgpt.step.eval_step import EvalStep
from jgpt.step.gradients import Cast, Exchange
from jgpt.step.state import TrainState
from jgpt.step.train_step import Numbers, Step, TrainStep

EACH = PartitionSpec((DATA, FSDP))  # the first axis: an element on each device
SAME = PartitionSpec()  # on all devices


class FullySharded:
    """Run a step on several devices: the state split over each group of `group` devices, a share of the batch on each.

    A `Strategy`. `group` divides the number of devices. Where it is smaller, each group holds the whole state, and only
    gradients go from group to group: for devices of several hosts, whose link is slow. `by_layer`: gather=layer.
    """

    decodes_alone = True

    def __init__(self, devices: Sequence[jax.Device], group: int, by_layer: bool = False) -> None:
        self.devices = list(devices)
        self.shares = len(self.devices)
        self._group, self._by_layer = group, by_layer
        self._mesh = device_mesh(self.devices, group, FSDP)
        self._whole = jax.jit(lambda x: x, out_shardings=NamedSharding(self._mesh, SAME))

    def _axes(self, tree: Any) -> Any:
        """Return the axis along which each array is split; -1 where each device has all of it."""
        return jax.tree.map(lambda x: split_axis(x.shape, self._group), tree)

    def _specs(self, tree: Any) -> Any:
        return jax.tree.map(lambda axis: SAME if axis < 0 else PartitionSpec(*[None] * axis, FSDP), self._axes(tree))

    def shardings(self, state: Any) -> Any:
        """Return where each array of a state lies: split along one axis, or a copy on every device."""
        return jax.tree.map(lambda x: NamedSharding(self._mesh, self._specs(x)), state)

    def model_for_step(self, model: GPT, policy: Policy) -> GPT:
        """Return the model, with gather=layer with blocks that gather their own parameters."""
        if not self._by_layer:
            return model
        block = abstract_params(model.config)["h_0"]  # all blocks have the same shapes
        return model.clone(gather=self._gather_block(block, policy.cast_to_compute))

    def train_step(self, step: Step) -> TrainStep:
        """Compile (state, frozen, batch [shares, A, B, ...]) -> (state, metrics); the state's memory is reused."""

        def on_all(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Numbers]:
            parts, axes = self._specs(state), self._axes(state.params)

            def on_one_device(state: TrainState, frozen: Any, batch: Batch) -> tuple[Any, Array]:
                exchange = Exchange(
                    average=partial(self._average, axes),
                    gather=partial(self._gather, axes),
                    gathers_each=self._by_layer,
                    device=jax.lax.axis_index((DATA, FSDP)),
                )
                return step.gradient(state, frozen, _own(batch), exchange)

            gradient, loss = jax.shard_map(
                on_one_device,
                mesh=self._mesh,
                in_specs=(parts, SAME, EACH),
                out_specs=(parts.params, SAME),
                check_vma=False,
            )(state, frozen, batch)
            state, numbers = step.update(state, gradient, loss, self._share)
            return jax.lax.with_sharding_constraint(state, self.shardings(state)), numbers

        return jax.jit(on_all, donate_argnums=0)

    def _gather(self, axes: Any, params: Any, cast: Cast) -> Any:
        """Return all of each parameter, cast; those that a block gathers itself are left as they are."""
        left = {name: params[name] for name in params if self._by_layer and name.startswith("h_")}
        mine = {name: params[name] for name in params if name not in left}
        return left | _gather_parts(cast(mine), {name: axes[name] for name in mine})

    def _gather_block(self, block: Any, cast: Cast) -> Callable[[Any], Any]:
        """Return what makes all of a block's parameters, cast, out of this device's part; `block` are full shapes.

        It casts here, where the block runs: no copy of this device's parts is kept in the compute dtype.
        """
        axes = self._axes(block)

        def gather(params: Any) -> Any:
            params = checkpoint_name(cast(params), GATHERED)
            return checkpoint_name(_gather_parts(params, axes), GATHERED)

        return gather

    def _average(self, axes: Any, gradient_and_loss: tuple[Any, Array]) -> tuple[Any, Array]:
        """Average a gradient and a loss over all devices; of the gradient each device receives its part.

        Each share is divided before it is added, so that fp16 holds the sum.
        """

        def average(x: Array, axis: int) -> Array:
            if axis < 0:
                return jax.lax.psum(x / self.shares, (DATA, FSDP))
            if not self._by_layer:  # there each micro-batch has averaged over the group already
                x = _scatter(x, axis, self._group)
            copies = self.shares // self._group
            return jax.lax.psum(x / copies, DATA) if copies > 1 else x

        gradient, loss = gradient_and_loss
        averaged = jax.tree.map(average, gradient, axes)
        return averaged, jax.lax.psum(loss / self.shares, (DATA, FSDP))

    def _share(self, function: Callable[[Array], Array], matrices: Array) -> Array:
        """Apply a function to independent matrices [n, rows, columns], of which each device holds a part of each.

        Each device of a group gets n / group whole ones, by an all-to-all, and sends the results back by another. Left
        to itself, XLA divides each matrix product, and gathers an operand for each.
        """
        axis = split_axis(matrices.shape[1:], self._group)
        if axis < 0:
            return function(matrices)

        def split_along(x: Array, axis: int) -> Array:
            return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh, PartitionSpec(*[None] * axis, FSDP)))

        padded = jnp.pad(matrices, ((0, -len(matrices) % self._group), (0, 0), (0, 0)))
        results = function(split_along(split_along(padded, 1 + axis), 0))
        return split_along(split_along(results, 0), 1 + axis)[: len(matrices)]

    def eval_step(self, step: EvalStep) -> EvalStep:
        """Compile (params, frozen, batch [shares, B, ...]) -> the loss summed over all devices."""

        def on_all(params: Any, frozen: Any, batch: Batch) -> Array:
            parts, axes = self._specs(params), self._axes(params)

            def on_one_device(params: Any, frozen: Any, batch: Batch) -> Array:
                return jax.lax.psum(step(params, frozen, _own(batch), partial(self._gather, axes)), (DATA, FSDP))

            return jax.shard_map(
                on_one_device, mesh=self._mesh, in_specs=(parts, SAME, EACH), out_specs=SAME, check_vma=False
            )(params, frozen, batch)

        return jax.jit(on_all)

    def lower(self, step: TrainStep, state: Any, frozen: Any, batch: Batch, accumulation: int) -> jax.stages.Lowered:
        """Trace a train step from shapes alone; `batch` is that of all devices, [G, ...]."""

        def placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        each = NamedSharding(self._mesh, EACH)
        shares = jax.tree.map(lambda x: placed(x, each), laid_out(batch, self.shares, accumulation))
        return step.lower(jax.tree.map(placed, state, self.shardings(state)), frozen, shares)  # type: ignore[attr-defined]

    def place_state(self, state: Any) -> Any:
        """Give each device its part of a state, laid out as the step returns it (else it compiles twice)."""
        return jax.tree.map(put, state, self.shardings(state))

    def place_param(self, path: tuple[str, ...], array: np.ndarray) -> Array:
        """Split one parameter over the devices; `path` is its keys in the tree."""
        return put(array, self.shardings(array))

    def own_rows(self, n: int) -> slice:
        """Return which sequences of a batch of `n` this process brings."""
        return own_rows(self.devices, n)

    def place_batch(self, batch: Batch, accumulation: int) -> Batch:
        """Put the own rows of a batch on the devices as [shares, A, B, ...], a share on each."""
        return self._put_shares(batch, accumulation)

    def place_sequences(self, batch: Batch) -> Batch:
        """Put the own rows of a batch on the devices as [shares, B, ...], a share on each."""
        return self._put_shares(batch)

    def _put_shares(self, batch: Batch, *lead: int) -> Batch:
        own, each = own_rows(self.devices, self.shares), NamedSharding(self._mesh, EACH)
        return jax.tree.map(lambda x: put_rows(x, each, self.shares), laid_out(batch, own.stop - own.start, *lead))

    def bytes_per_device(self, state: Any, frozen: Any) -> int:
        """Return the bytes that a device holds: its part of the state."""
        return split_bytes((state, frozen), self.shardings((state, frozen)))

    def params_in_loop(self, params: Any, cast: Cast) -> Any:
        """Return the shapes of all parameters in the compute dtype; with gather=layer, of the parts that it stores."""
        if not self._by_layer:
            return jax.eval_shape(cast, params)

        def part(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)

        return jax.tree.map(part, params, self.shardings(params))

    def for_decoding(self, tree: Any) -> Any:
        """Return all of a tree on the first device, which decodes alone; in each process on its own first one."""
        if n_processes() == 1:
            return jax.device_put(tree, self.devices[0])
        return jax.tree.map(lambda x: self._whole(x).addressable_shards[0].data, tree)  # one array after the other

    def to_inspect(self, tree: Any) -> Any:
        """Return the tree as it is."""
        return tree

    def to_save(self, state: Any) -> Any:
        """Return what a checkpoint is written from: arrays that the next step does not overwrite."""
        return saved_from(state, self.devices[0])

    def on_host(self, tree: Any) -> Any:
        """Fetch a tree as numpy arrays, each of them complete."""
        return jax.tree.map(lambda x: np.asarray(x if x.is_fully_replicated else self._whole(x)), tree)


def _own(batch: Batch) -> Batch:
    """Take this device's share [A, B, ...] out of what it was sent, [1, A, B, ...]."""
    return jax.tree.map(lambda x: x[0], batch)


def _gather_parts(params: Any, axes: Any) -> Any:
    """Return all of each parameter, of which each device of a group brings its part."""
    return jax.tree.map(lambda x, axis: x if axis < 0 else _gathered(x, axis), params, axes)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: Array, axis: int) -> Array:
    """Gather an array from its parts; its gradient is averaged over the group, and each device receives its part."""
    return jax.lax.all_gather(x, FSDP, axis=axis, tiled=True)


def _scatter(x: Array, axis: int, group: int) -> Array:
    return jax.lax.psum_scatter(x / group, FSDP, scatter_dimension=axis, tiled=True)


_gathered.defvjp(
    lambda x, axis: (_gathered(x, axis), None),
    lambda axis, _, gradient: (_scatter(gradient, axis, jax.lax.axis_size(FSDP)),),
)
