"""The parts of a run that need no text: a config, shapes and devices in; the model, its state and its steps out.

In the data path: what training joins to the token files. A plan asks for the same parts on devices that are not here,
so that what it compiles is what training runs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jgpt.data.batches import Batch, Batches, ChatBatches
from jgpt.hardware.devices import choose_device_policy
from jgpt.model.columns import for_devices
from jgpt.model.gpt import GPT
from jgpt.model.lora import lora_config
from jgpt.model.parameters import abstract_stored, count_adapters, flops_per_token
from jgpt.model.precision import DTYPES, Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.attention import attention_of_run
from jgpt.parallel.devices import micro_batch_sizes, splits_model
from jgpt.parallel.evaluation import evaluate
from jgpt.parallel.fsdp import FullySharded
from jgpt.parallel.replicate import Replicate
from jgpt.parallel.rules import FSDP, TENSOR, group_size
from jgpt.parallel.strategy import Strategy
from jgpt.parallel.tensor_parallel import TensorParallel
from jgpt.step.eval_step import EvalStep, make_eval_step
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import TrainState, init_state, tree_bytes
from jgpt.step.train_step import Step, TrainStep


@dataclass(frozen=True)
class Parts:
    """The parts of a run that need no text; nothing is allocated on the devices."""

    shapes: ModelConfig
    model: GPT
    policy: Policy
    strategy: Strategy
    accumulation: int  # A
    rows: int  # B: sequences on one device at a time
    sequence_length: int  # T
    adapters: int  # LoRA's parameters; 0 without it
    is_chat: bool  # batches carry weights and segments
    init: Callable[..., TrainState]  # pure: (parameters to begin from, or None) -> the first state
    train_step: TrainStep
    eval_step: EvalStep

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, on all devices together."""
        return self.strategy.shares * self.accumulation * self.rows * self.sequence_length

    @property
    def flops_per_token(self) -> float:
        """The model's floating-point operations for one token of training."""
        return flops_per_token(replace(self.shapes, context_length=self.sequence_length), self.adapters)

    def own_batch(self, batches: Batches | ChatBatches, step: int) -> Batch:
        """Return the batch that follows `step` steps, on its way to the devices of this process."""
        rows = self.strategy.own_rows(batches.global_batch_size)
        return self.strategy.place_batch(batches.batch(step, rows), self.accumulation)

    def evaluate(self, params: Any, frozen: Any, blocks: Iterable[Batch]) -> float:
        """Return the mean loss of single sequences, in nats per target token; see `parallel/evaluation.py`."""
        return evaluate(
            self.strategy, self.eval_step, params, frozen, blocks, self.rows, context_length=self.sequence_length
        )[0]

    def abstract_frozen(self) -> Any:
        """Return LoRA's base parameters as shapes; {} without it."""
        return abstract_stored(self.model.config, self.policy.compute) if self.model.lora else {}

    def first_state(self, params: Any = None) -> TrainState:
        """Make the state of step 0 on the devices, where it lies in training; the memory of `params` is reused."""
        lies = self.strategy.shardings(jax.eval_shape(self.init))
        return jax.jit(self.init, donate_argnums=0, out_shardings=lies)(params)

    @property
    def state_bytes(self) -> int:
        """Bytes of a training state, and so of a checkpoint."""
        return tree_bytes(jax.eval_shape(self.init))

    def abstract_batch(self) -> Batch:
        """Return the batch of an optimizer step, [G, ...], as shapes."""
        sequences = self.strategy.shares * self.accumulation * self.rows
        tokens, targets = (sequences, self.sequence_length + 1), (sequences, self.sequence_length)
        batch = Batch(jax.ShapeDtypeStruct(tokens, jnp.int32))
        if self.is_chat:
            weights, segments = jax.ShapeDtypeStruct(targets, jnp.float32), jax.ShapeDtypeStruct(targets, jnp.int32)
            batch = batch._replace(weights=weights, segments=segments)
        return batch

    def lower(self) -> jax.stages.Lowered:
        """Trace the train step for the devices, from shapes alone; `compile()` of what is returned compiles it."""
        state = jax.eval_shape(self.init)
        return self.strategy.lower(
            self.train_step, state, self.abstract_frozen(), self.abstract_batch(), self.accumulation
        )

    def params_in_loop(self) -> Any:
        """Return the shapes of the parameters that a device has in the loop over micro-batches.

        Their gradients have the same shapes. These are all parameters in the compute dtype; where each micro-batch
        gathers them, they are the parts that the device stores.
        """
        return self.strategy.params_in_loop(jax.eval_shape(self.init).params, self.policy.cast_to_compute)

    def gathered_bytes(self) -> int:
        """Return the bytes of what the loop over micro-batches keeps: parameters, gradients, their fp32 sums."""
        params = self.params_in_loop()
        return 2 * tree_bytes(params) + 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    def least_bytes(self) -> int:
        """Return the bytes of a device that any step takes: parameters, moments, the frozen ones of LoRA."""
        return self.strategy.bytes_per_device(jax.eval_shape(self.init), self.abstract_frozen())


def make_parts(config: ConfigDict, shapes: ModelConfig, devices: list[jax.Device]) -> Parts:
    """Build the parts of a run for `devices`, which may be compile-only ones. Raises UserError.

    `config` has no "auto" left in its micro-batch and its remat (see `search.py`).
    """
    execution, precision = config.execution, config.precision
    assert execution.micro_batch_size and execution.remat != "auto"
    strategy, shared = make_strategy(config, shapes, devices)
    policy = choose_device_policy(precision.compute, precision.params, devices[0])
    sizes = micro_batch_sizes(config.batch.global_batch_size, strategy.shares)
    rows = max(n for n in sizes if n <= execution.micro_batch_size)
    accumulation = config.batch.global_batch_size // strategy.shares // rows
    lora = lora_config(config.lora)
    attention = attention_of_run(config, shared, policy, devices, group=len(devices) // strategy.shares)
    plain = GPT(shapes, policy.compute, execution.remat, lora)  # makes the parameters, so it needs no fused attention
    model = GPT(shared, policy.compute, execution.remat, lora, attention, policy.activations)
    stepped = strategy.model_for_step(model, policy)
    optimizer = make_optimizer(config.optimizer, policy, DTYPES[precision.first_moment])
    step = Step(
        stepped,
        policy,
        optimizer,
        learning_rate_schedule(config.optimizer),
        accumulation=accumulation,
        seed=config.seed,
        loss_chunk_tokens=execution.loss_chunk_tokens,
        growth_steps=precision.loss_scale_growth_steps,
        average_dtype=DTYPES[precision.gradient_average],
    )

    def init(params: Any = None) -> TrainState:
        return init_state(plain, policy, optimizer, config.seed, precision.loss_scale, params)

    return Parts(
        shapes=shapes,
        model=model,
        policy=policy,
        strategy=strategy,
        accumulation=accumulation,
        rows=rows,
        sequence_length=config.batch.sequence_length or shapes.context_length,
        adapters=count_adapters(shapes, lora),
        is_chat=config.data.format == "chat",
        init=init,
        train_step=strategy.train_step(step),
        eval_step=strategy.eval_step(make_eval_step(stepped, policy, execution.loss_chunk_tokens)),
    )


def make_strategy(config: ConfigDict, shapes: ModelConfig, devices: list[jax.Device]) -> tuple[Strategy, ModelConfig]:
    """Return how the step runs on the devices, and the model's shapes as they share it."""
    if splits_model(config):
        group = group_size(config.execution.mesh, TENSOR, len(devices))
        shared = for_devices(shapes, group)
        return TensorParallel(devices, shared, group), shared
    if config.execution.parallel == "fsdp":
        group = group_size(config.execution.mesh, FSDP, len(devices))
        return FullySharded(devices, group, by_layer=config.execution.gather == "layer"), shapes  # "auto": settled
    return Replicate(devices), shapes
