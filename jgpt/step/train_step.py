"""The optimizer step: a state and a batch in, the next state and its metrics out. Pure; it knows no device.

In the data path: between the batches and the checkpoint. `parallel/` runs its two halves on devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jgpt.data.batches import Batch
from jgpt.model.columns import regroup_tree
from jgpt.model.gpt import GPT, Output, unembedding
from jgpt.model.loss import cross_entropy
from jgpt.model.precision import Policy
from jgpt.step.gradients import Exchange, average_gradients, mean_gradient
from jgpt.step.loss_scale import next_loss_scale
from jgpt.step.muon import Share, alone
from jgpt.step.state import TrainState

Numbers = dict[str, Array]  # scalars
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Numbers]]


class Step(NamedTuple):
    """An optimizer step in two halves, which a strategy runs one after the other.

    The first works on one device's share of the batch, the second on what the devices have averaged.
    """

    gradient: Callable[[TrainState, Any, Batch, Exchange], tuple[Any, Array]]
    """(state, frozen, batch [A, B, ...], exchange) -> (gradient, loss), averaged over the devices; fp32."""
    update: Callable[[TrainState, Any, Array, Share], tuple[TrainState, Numbers]]
    """(state, gradient, loss, share) -> (the next state, metrics)."""

    def __call__(self, state: TrainState, frozen: Any, batch: Batch, exchange: Exchange) -> tuple[TrainState, Numbers]:
        """Run both halves on a device that holds the whole state."""
        return self.update(state, *self.gradient(state, frozen, batch, exchange), exchange.share)


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
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    accumulation: int,
    seed: int,
    loss_chunk_tokens: int,
    growth_steps: int,
    average_dtype: Any = jnp.float32,
) -> Step:
    """Return the two halves of the step as pure functions.

    A micro-batches run one after another; then comes one exchange between the devices, one finite check whose answer is
    the same on every device, and one update. A step with a non-finite gradient changes no parameter, no moment and no
    schedule. `growth_steps` and `average_dtype` matter under loss scaling alone: see `next_loss_scale` and
    `average_gradients`.
    """
    loss_of = _scaled_loss(model, loss_chunk_tokens)
    narrow = policy.scales_loss and average_dtype == jnp.float16

    def gradient(state: TrainState, frozen: Any, batch: Batch, exchange: Exchange) -> tuple[Any, Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), exchange.device)

        def gather(params: Any) -> Any:
            return exchange.gather(params, policy.cast_to_compute)

        once, each = (_as_they_are, gather) if exchange.gathers_each else (gather, _as_they_are)
        params = once(state.params)
        base = policy.cast_to_compute(frozen)
        scale = state.loss_scale.scale

        def scaled_gradient(micro_batch: Batch, index: Array) -> tuple[Any, Array]:
            dropout_key = jax.random.fold_in(key, index)

            def loss(params: Any) -> tuple[Array, Array]:
                return loss_of(each(params), base, micro_batch, dropout_key, scale)

            return jax.grad(loss, has_aux=True)(params)

        mean, losses = mean_gradient(scaled_gradient, params, batch, scale, accumulation)
        return average_gradients(exchange.average, mean, jnp.mean(losses), scale, narrow)

    def update(state: TrainState, gradient: Any, loss: Array, share: Share = alone) -> tuple[TrainState, Numbers]:
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params, share=share)
            new_params = optax.apply_updates(state.params, updates)
        loss_scale = next_loss_scale(state.loss_scale, finite, growth_steps if policy.scales_loss else 0)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        params, opt_state = keep(new_params, state.params), keep(opt_state, state.opt_state)
        next_state = TrainState(state.step + 1, state.updates + finite, params, opt_state, loss_scale)
        return next_state, {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.updates), jnp.float32),
            "loss_scale": state.loss_scale.scale,
            "skipped_steps": loss_scale.skipped_steps,
            "skipped_in_a_row": loss_scale.skipped_in_a_row,
        }

    return Step(gradient, update)


def _as_they_are(params: Any) -> Any:
    return params


def _scaled_loss(model: GPT, loss_chunk_tokens: int) -> Callable[..., tuple[Array, Array]]:
    """Return (params, frozen, batch [B, ...], dropout key, scale) -> (scale * mean loss, mean loss), both fp32."""

    def scaled_loss(params: Any, frozen: Any, batch: Batch, key: Array, scale: Array) -> tuple[Array, Array]:
        hidden, matrix = hidden_states(model, params, frozen, batch, deterministic=False, rngs={"dropout": key})
        targets = batch.tokens[:, 1:]
        weights = jnp.ones(targets.shape, jnp.float32) if batch.weights is None else batch.weights
        loss = cross_entropy(hidden, matrix, targets, weights, loss_chunk_tokens) / targets.size
        return loss * scale, loss

    return scaled_loss
