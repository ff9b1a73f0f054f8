"""The parts of a run that need no text: a config, shapes and devices in; the model, its state and its steps out.

In the data path: what training joins to the token files. A plan asks for the same parts on devices that are not here,
so that what it compiles is what training runs.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jgpt.data.batches import Batch, Batches, ChatBatches
from jgpt.errors import UserError
from jgpt.hardware.devices import all_devices, compute_capability
from jgpt.model.attention.choose import choose_attention
from jgpt.model.columns import for_devices
from jgpt.model.gpt import GPT
from jgpt.model.lora import LoRA, lora_config
from jgpt.model.parameters import abstract_adapters, abstract_params, abstract_stored, flops_per_token
from jgpt.model.precision import DTYPES, Policy, choose_policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.fsdp import FullySharded
from jgpt.parallel.mesh import Sharded
from jgpt.parallel.replicate import Replicate
from jgpt.parallel.rules import AXIS, PARTS, group_size
from jgpt.parallel.strategy import Strategy
from jgpt.step.eval_step import EvalStep, make_eval_step
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import TrainState, init_state, tree_bytes
from jgpt.step.train_step import Step, TrainStep

# By JAX's platform: the environment variable that leaves a process some of its devices, and how it leaves it one.
_VISIBLE = {"cpu": "JAX_NUM_CPU_DEVICES", "gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}
_ONE_DEVICE = {
    "cpu": "JAX_NUM_CPU_DEVICES=1",
    "gpu": "CUDA_VISIBLE_DEVICES=0",
    "tpu": "TPU_VISIBLE_CHIPS=0 TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1 TPU_PROCESS_BOUNDS=1,1,1",
}

log = logging.getLogger("jgpt")


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
        params = jax.eval_shape(self.init).params
        if isinstance(self.strategy, FullySharded) and self.strategy.by_layer:
            return self.strategy.part_of(params)
        return jax.eval_shape(self.policy.cast_to_compute, params)

    def gathered_bytes(self) -> int:
        """Return the bytes of what the loop over micro-batches keeps: parameters, gradients, their fp32 sums."""
        params = self.params_in_loop()
        return 2 * tree_bytes(params) + 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    def least_bytes(self) -> int:
        """Return the bytes of a device that any step takes: parameters, moments, the frozen ones of LoRA."""
        return self.strategy.bytes_per_device(jax.eval_shape(self.init), self.abstract_frozen())


def micro_batch_sizes(global_batch_size: int, shares: int) -> list[int]:
    """List the micro-batches that one device's share of a batch can be cut into.

    >>> micro_batch_sizes(24, 2)
    [1, 2, 3, 4, 6, 12]
    """
    share = global_batch_size // shares
    return [n for n in range(1, share + 1) if share % n == 0]


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
    attention = _attention(config, shared, policy, devices)
    plain = GPT(shapes, policy.compute, execution.remat, lora)  # makes the parameters, so it needs no fused attention
    model = GPT(shared, policy.compute, execution.remat, lora, attention, policy.activations)
    if isinstance(strategy, Sharded):
        model = model.clone(split=strategy.split_attention)
    optimizer = make_optimizer(config.optimizer, policy, DTYPES[precision.first_moment])
    stepped = model
    if isinstance(strategy, FullySharded) and strategy.by_layer:
        stepped = model.clone(gather=strategy.gather_block(abstract_params(shapes)["h_0"], policy.cast_to_compute))
    train_step = Step(
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
        adapters=_count_adapters(shapes, lora),
        is_chat=config.data.format == "chat",
        init=init,
        train_step=strategy.train_step(train_step),
        eval_step=strategy.eval_step(make_eval_step(stepped, policy, execution.loss_chunk_tokens)),
    )


def make_strategy(config: ConfigDict, shapes: ModelConfig, devices: list[jax.Device]) -> tuple[Strategy, ModelConfig]:
    """Return how the step runs on the devices, and the model's shapes as they share it."""
    if _splits_model(config):
        group = group_size(config.execution.mesh, AXIS, len(devices))
        shared = for_devices(shapes, group)
        return Sharded(devices, shared, group), shared
    if config.execution.parallel == "fsdp":
        group = group_size(config.execution.mesh, PARTS, len(devices))
        return FullySharded(devices, group, by_layer=config.execution.gather == "layer"), shapes  # "auto": settled
    return Replicate(devices), shapes


def batch_shares(config: ConfigDict, n_devices: int, fewer: str = "") -> int:
    """Return how many equal parts the global batch is divided into on so many devices. Raises UserError.

    One for each device; where devices split the model, one for each group that does. `fewer` says in the message how to
    take fewer devices.
    """
    size, shares, name = config.batch.global_batch_size, n_devices, "devices"
    if _splits_model(config):
        shares, name = n_devices // group_size(config.execution.mesh, AXIS, n_devices), "groups of devices"
    if size % shares:
        nearest = max(1, round(size / shares)) * shares
        raise UserError(
            f"batch.global_batch_size is {size}, and there are {shares} {name}. Each takes the same number of"
            f" sequences, so it must be a multiple of {shares}: set --config.batch.global_batch_size={nearest}"
            f"{', or ' if fewer else ''}{fewer}."
        )
    return shares


def training_devices(config: ConfigDict) -> list[jax.Device]:
    """Choose the devices of a run, in all its processes: they share its batch, or split its model.

    All of them, but on CPU, where a device is a share of the same cores: there the largest number in each process so
    that all divide the batch. Raises UserError where the devices cannot share the batch equally.
    """
    devices = all_devices()
    each = [list(group) for _, group in groupby(devices, key=lambda device: device.process_index)]
    if len({len(own) for own in each}) > 1:
        raise UserError(
            f"the processes of this run have {', '.join(str(len(own)) for own in each)} devices. Allowed: the same"
            f" number in each. Start them on machines of one kind, or set {_VISIBLE[devices[0].platform]} to as many in"
            " each."
        )
    if devices[0].platform == "cpu" and not _splits_model(config):
        size = config.batch.global_batch_size
        fitting = [n for n in range(1, len(each[0]) + 1) if size % (n * len(each)) == 0]
        if fitting:
            return [device for own in each for device in own[: fitting[-1]]]
    batch_shares(config, len(devices), f"use fewer devices ({_ONE_DEVICE[devices[0].platform]})")
    return devices


def _splits_model(config: ConfigDict) -> bool:
    return config.execution.parallel == "tensor"


def _attention(config: ConfigDict, shapes: ModelConfig, policy: Policy, devices: list[jax.Device]) -> str:
    """Return the form of attention: what the config names, or what suits the devices and the model, as they share it.

    Raises UserError where there is no such form.
    """
    wanted, split = config.execution.attention, _splits_model(config)
    if split and wanted == "auto":
        return "chunked"  # the only form that was measured with the model split
    form = choose_attention(
        wanted,
        policy.compute,
        devices[0].platform,
        compute_capability(devices[0]),
        d_head=shapes.d_head,
        deterministic=config.execution.deterministic,
    )
    group = group_size(config.execution.mesh, AXIS, len(devices)) if split else 1
    if wanted == "flash" and split and (form != "flash" or shapes.n_kv_heads % group):
        raise UserError(
            f"execution.attention='flash' with execution.parallel='tensor', {shapes.n_kv_heads} key/value heads on"
            f" {group} devices in {jnp.dtype(policy.compute).name}: there is no fused attention for this. Allowed: fp16"
            " on GPUs, and heads that the devices divide. Take --config.execution.attention=auto."
        )
    if wanted == "flash" and config.model.dropout:
        _say_once(
            f"execution.attention='flash' with model.dropout={config.model.dropout:g}: a fused kernel drops no weights"
            " of attention, so training takes 'chunked'. For the kernel, set --config.model.dropout=0."
        )
    return form


@cache
def _say_once(message: str) -> None:
    """Warn, the first time: a search for the fastest step builds many."""
    log.warning("%s", message)


def _count_adapters(shapes: ModelConfig, lora: LoRA | None) -> int:
    """Count the parameters of the adapters; raise UserError where the model has none of the layers that they adapt."""
    if lora is None:
        return 0
    there = ("qkv", "proj", "gate_up" if shapes.mlp == "swiglu" else "up", "down")
    if not set(there) & set(lora.targets):
        raise UserError(
            f"lora.targets={','.join(lora.targets)!r}, and this model has none of these layers. Allowed:"
            f" {', '.join(there)}. Set --config.lora.targets={','.join(there)}."
        )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_adapters(shapes, lora)))


def choose_device_policy(compute: str, params: str, device: jax.Device) -> Policy:
    """Resolve the precision group of a config for a device."""
    return choose_policy(compute, params, device.platform, compute_capability(device))
