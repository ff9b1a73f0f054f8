"""The optimizer step: a state and a batch in, the next state and its metrics out. The only file that knows pmap.

In the data path: between the batches and the checkpoint. `make_train_step` is the step as a pure function; `Pmap` is
how it runs: a copy of the state on every device, a share of the batch each, gradients averaged once a step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.data.batches import Batch
from jgpt.model.gpt import GPT, Output, unembedding
from jgpt.model.lora import init_adapters
from jgpt.model.loss import cross_entropy
from jgpt.model.precision import Policy
from jgpt.model.sharding import regroup_tree

MAX_LOSS_SCALE = 2.0**24


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


Average = Callable[[Any], Any]  # over the devices
Numbers = dict[str, Array]  # scalars
Step = Callable[[TrainState, Any, Batch, Average, Any], tuple[TrainState, Numbers]]
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Numbers]]
EvalStep = Callable[[Any, Any, Batch], Array]


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


def variables(model: GPT, params: Any, frozen: Any) -> dict[str, Any]:
    """Return what `model.apply` takes: `params` are all parameters, or with LoRA the adapters to the `frozen` ones.

    Adapters are kept as the plain model has them. Where devices share the model they are rearranged here, inside the
    step, so that copies of one key/value head stay one: their gradients are added up.
    """
    if model.lora is None:
        return {"params": params}
    return {"params": frozen, "lora": regroup_tree(params, model.config)}


def hidden_states(model: GPT, params: Any, frozen: Any, batch: Batch, **how: Any) -> tuple[Array, Array]:
    """Run the model on a batch's inputs; return the hidden states [B, T, D] and the output layer's matrix [V, D]."""
    given = variables(model, params, frozen)
    output = cast(Output, model.apply(given, batch.tokens[..., :-1], segments=batch.segments, **how))
    return output.hidden, unembedding(given["params"])


def make_train_step(
    model: GPT,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation: int,
    seed: int,
    loss_chunk_tokens: int,
    growth_steps: int,
    average_dtype: Any = jnp.float32,
) -> Step:
    """Return the step as a pure function (state, frozen, batch [A, B, ...], average, device) -> (state, metrics).

    `average` averages a tree over the devices that share the batch (the identity on one), `device` is this one's index.
    A micro-batches run one after another and `optax.MultiSteps` keeps the mean of their gradients; its accumulator
    lives inside the step only, so that a state between steps never holds a half-done accumulation and no moment is
    touched before the last micro-batch. Then one average, one finite check whose answer is the same on every device,
    one update. A step with a non-finite gradient changes no parameter, no moment and no schedule. Under loss scaling
    `average_dtype` fp16 halves what the devices send each other: the gradients go with the loss scale on them, at which
    fp16 has held those of every micro-batch.
    """
    narrow = policy.scales_loss and average_dtype == jnp.float16
    # It would hand the mean out, and begin anew, one micro-batch after the last: until then its state holds the mean,
    # and the loop over micro-batches carries no second tree of gradients.
    accumulate = optax.MultiSteps(optax.identity(), every_k_schedule=accumulation + 1)

    def scaled_loss(params: Any, frozen: Any, batch: Batch, key: Array, scale: Array) -> tuple[Array, Array]:
        hidden, matrix = hidden_states(model, params, frozen, batch, deterministic=False, rngs={"dropout": key})
        targets = batch.tokens[:, 1:]
        weights = jnp.ones(targets.shape, jnp.float32) if batch.weights is None else batch.weights
        loss = cross_entropy(hidden, matrix, targets, weights, loss_chunk_tokens) / targets.size
        return loss * scale, loss

    def train_step(
        state: TrainState, frozen: Any, batch: Batch, average: Average, device: Any
    ) -> tuple[TrainState, Numbers]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), device)
        params = policy.cast_to_compute(state.params)  # once a step, not once a micro-batch
        base = policy.cast_to_compute(frozen)
        scale = state.loss_scale.scale

        def micro_step(accumulated: optax.MultiStepsState, x: tuple[Batch, Array]) -> tuple[Any, Array]:
            micro_batch, index = x
            gradient, loss = jax.grad(scaled_loss, has_aux=True)(
                params, base, micro_batch, jax.random.fold_in(key, index), scale
            )
            with jax.named_scope("accumulate"):
                gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, gradient)
                _, accumulated = accumulate.update(gradient, accumulated)
            return accumulated, loss

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        accumulated, losses = jax.lax.scan(micro_step, accumulate.init(zeros), (batch, jnp.arange(accumulation)))
        gradient = accumulated.acc_grads
        if narrow:
            gradient = jax.tree.map(lambda g: (g * scale).astype(jnp.float16), gradient)
        gradient, loss = average((gradient, jnp.mean(losses)))
        if narrow:
            gradient = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            new_params = optax.apply_updates(state.params, updates)
        loss_scale = _next_loss_scale(state.loss_scale, finite, growth_steps if policy.scales_loss else 0)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        next_state = TrainState(
            step=state.step + 1,
            updates=state.updates + finite,
            params=keep(new_params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            loss_scale=loss_scale,
        )
        return next_state, {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.updates), jnp.float32),
            "loss_scale": scale,
            "skipped_steps": loss_scale.skipped_steps,
            "skipped_in_a_row": loss_scale.skipped_in_a_row,
        }

    return train_step


def _next_loss_scale(old: LossScale, finite: Array, growth_steps: int) -> LossScale:
    """Halve the scale after an overflow, double it after `growth_steps` good steps (0: leave it alone)."""
    good_steps = jnp.where(finite, old.good_steps + 1, 0)
    scale = old.scale
    if growth_steps:
        grow = good_steps >= growth_steps
        scale = jnp.where(grow, jnp.minimum(scale * 2, MAX_LOSS_SCALE), scale)
        scale = jnp.where(finite, scale, jnp.maximum(old.scale / 2, 1.0))
        good_steps = jnp.where(grow, 0, good_steps)
    return LossScale(
        scale=scale,
        good_steps=good_steps,
        skipped_steps=old.skipped_steps + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, old.skipped_in_a_row + 1),
    )


def make_eval_step(model: GPT, policy: Policy, loss_chunk_tokens: int) -> EvalStep:
    """Return (params, frozen, batch [B, ...]) -> the loss of its targets, weighted and summed, fp32."""

    def eval_step(params: Any, frozen: Any, batch: Batch) -> Array:
        params, frozen = policy.cast_to_compute(params), policy.cast_to_compute(frozen)
        hidden, matrix = hidden_states(model, params, frozen, batch)
        assert batch.weights is not None
        return cross_entropy(hidden, matrix, batch.tokens[:, 1:], batch.weights, loss_chunk_tokens)

    return eval_step


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
