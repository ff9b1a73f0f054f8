"""The optimizer step: a state and a batch in, the next state and its metrics out. Pure; it knows no device.

In the data path: between the batches and the checkpoint. `parallel/` runs its two halves on devices.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, cast

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
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Numbers]]  # a Step, compiled for devices


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


@dataclass(frozen=True)
class Step:
    """An optimizer step in two halves, which a strategy runs one after the other.

    The first works on one device's share of the batch: its A micro-batches run one after another, then comes one
    exchange between the devices. The second works on what the devices have averaged: one finite check, whose answer is
    the same on every device, and one update. A step with a non-finite gradient changes no parameter, no moment and no
    schedule.
    """

    model: GPT
    policy: Policy
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    _: KW_ONLY
    accumulation: int  # A
    seed: int  # of dropout
    loss_chunk_tokens: int
    growth_steps: int  # under loss scaling alone: see `next_loss_scale`
    average_dtype: Any = jnp.float32  # or fp16, under loss scaling alone: see `average_gradients`

    def __call__(self, state: TrainState, frozen: Any, batch: Batch, exchange: Exchange) -> tuple[TrainState, Numbers]:
        """Run both halves on a device that holds the whole state."""
        return self.update(state, *self.gradient(state, frozen, batch, exchange), exchange.share)

    def gradient(self, state: TrainState, frozen: Any, batch: Batch, exchange: Exchange) -> tuple[Any, Array]:
        """Return the mean gradient of a batch [A, B, ...] and its mean loss, averaged over the devices; both fp32."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), state.step), exchange.device)

        def gather(params: Any) -> Any:
            return exchange.gather(params, self.policy.cast_to_compute)

        once, each = (_as_they_are, gather) if exchange.gathers_each else (gather, _as_they_are)
        params = once(state.params)
        base = self.policy.cast_to_compute(frozen)
        scale = state.loss_scale.scale

        def scaled_gradient(micro_batch: Batch, index: Array) -> tuple[Any, Array]:
            dropout_key = jax.random.fold_in(key, index)

            def loss(params: Any) -> tuple[Array, Array]:
                return self._scaled_loss(each(params), base, micro_batch, dropout_key, scale)

            return jax.grad(loss, has_aux=True)(params)

        mean, losses = mean_gradient(scaled_gradient, params, batch, scale, self.accumulation)
        narrow = self.policy.scales_loss and self.average_dtype == jnp.float16
        return average_gradients(exchange.average, mean, jnp.mean(losses), scale, narrow)

    def _scaled_loss(
        self, params: Any, frozen: Any, batch: Batch, dropout_key: Array, scale: Array
    ) -> tuple[Array, Array]:
        """Return scale * the mean loss of a micro-batch [B, ...], and its mean loss; both fp32."""
        rngs = {"dropout": dropout_key}
        hidden, matrix = hidden_states(self.model, params, frozen, batch, deterministic=False, rngs=rngs)
        targets = batch.tokens[:, 1:]
        weights = jnp.ones(targets.shape, jnp.float32) if batch.weights is None else batch.weights
        loss = cross_entropy(hidden, matrix, targets, weights, self.loss_chunk_tokens) / targets.size
        return loss * scale, loss

    def update(self, state: TrainState, gradient: Any, loss: Array, share: Share = alone) -> tuple[TrainState, Numbers]:
        """Return the next state and the metrics, from the averaged gradient and loss."""
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)

        with jax.named_scope("optimizer"):
            updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params, share=share)
            new_params = optax.apply_updates(state.params, updates)
        growth_steps = self.growth_steps if self.policy.scales_loss else 0
        loss_scale = next_loss_scale(state.loss_scale, finite, growth_steps)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        params, opt_state = keep(new_params, state.params), keep(opt_state, state.opt_state)
        next_state = TrainState(state.step + 1, state.updates + finite, params, opt_state, loss_scale)
        return next_state, {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(self.schedule(state.updates), jnp.float32),
            "loss_scale": state.loss_scale.scale,
            "skipped_steps": loss_scale.skipped_steps,
            "skipped_in_a_row": loss_scale.skipped_in_a_row,
        }


def _as_they_are(params: Any) -> Any:
    return params
