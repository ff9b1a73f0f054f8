"""From a config to everything that a run needs.

In the data path: between the token files, or the model that `init_from` names, and the loop.
"""

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jgpt.config import UserError, default_config, flatten
from jgpt.data.batches import Batch, Batches, ChatBatches, make_batches, validation_blocks
from jgpt.data.memmap import TokenData
from jgpt.exchange.families import home
from jgpt.hardware.devices import compute_capability, describe, training_devices
from jgpt.model.attention import choose_attention
from jgpt.model.build import abstract_adapters, count_parameters, flops_per_token, lora_config, model_config
from jgpt.model.gpt import GPT, ModelConfig
from jgpt.model.lora import LoRA
from jgpt.model.precision import DTYPES, Policy
from jgpt.model.sharding import for_devices
from jgpt.training.checkpoint import read_meta, state_bytes, whole_steps
from jgpt.training.loading import choose_device_policy
from jgpt.training.metrics import format_count
from jgpt.training.optimizer import learning_rate_schedule, make_optimizer
from jgpt.training.run_dir import read_config
from jgpt.training.source import Source, is_run, load_params, local_directory, open_source
from jgpt.training.step import EvalStep, Pmap, TrainState, TrainStep, init_state, make_eval_step, make_train_step
from jgpt.training.tensor_parallel import TensorParallel

log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class Training:
    """The parts of a run: what the loop calls, and the numbers that it reports with."""

    model: GPT
    policy: Policy
    runner: Pmap | TensorParallel
    accumulation: int  # A
    rows: int  # B: sequences on one device at a time
    sequence_length: int  # T
    batches: Batches | ChatBatches
    val_blocks: list[Batch]  # single sequences
    source: Source | None  # the model that `init_from` names, where its parameters are needed
    init: Callable[..., TrainState]  # pure: (parameters to begin from, or None) -> the first state
    train_step: TrainStep
    eval_step: EvalStep
    flops_per_token: float
    peak_flops: float | None  # of all devices
    tokens_per_step: int

    def batch(self, step: int) -> Batch:
        """Return the batch that follows `step` steps, [shares, A, B, ...], on its way to the devices."""
        batch = self.batches.batch(step)
        shape = self.runner.shares, self.accumulation, self.rows, -1
        return self.runner.place_batch(jax.tree.map(lambda x: x.reshape(shape), batch))

    def first_state(self) -> TrainState:
        """Make the state of step 0, from the parameters of `init_from` where all of them are trained."""
        params = None
        if self.source is not None and self.model.lora is None:
            device = self.runner.devices[0]
            params = load_params(self.source, self.policy.param, lambda path, array: jax.device_put(array, device))
        return jax.jit(self.init, donate_argnums=0)(params)

    def frozen(self) -> Any:
        """Load the base parameters that LoRA leaves as they are, matrices in the compute dtype; without it {}."""
        if self.model.lora is None:
            return {}
        assert self.source is not None
        return load_params(self.source, self.policy.compute, self.runner.place_param)


def adopt_source(config: ConfigDict, run_dir: Path) -> tuple[ConfigDict, Source | None]:
    """Put into a config what its `init_from` settles: the model, all but its dropout, and the tokenizer.

    Also return the source where its parameters are needed: to begin from, and under LoRA always. A run that goes on has
    all else in its directory. Raises UserError where `init_from` is no such model, no longer the one that the run in
    `run_dir` began from, or is contradicted by another key.
    """
    if not config.init_from:
        return config, None
    config = config.copy_and_resolve_references()
    directory = local_directory(config.init_from)
    config.init_from = config.init_from if directory is None else str(directory)
    begun = (run_dir / "config.json").is_file() and bool(whole_steps(run_dir / "checkpoints"))
    settled, source = read_config(run_dir) if begun else None, None
    if settled is None or config.lora.rank or settled.init_from != config.init_from:
        source = open_source(config.init_from, fingerprint=_began_from(run_dir) if begun else "")
    if settled is None:
        assert source is not None
        settled = source.config
        tokenizer = source.directory / "tokenizer" if is_run(source.directory) else source.directory
        settled.tokenizer.update({"kind": "hf", "pretrained": str(tokenizer)})
    _check_against(config, settled)
    config.model.update({**settled.model, "dropout": config.model.dropout})
    config.tokenizer.update({**settled.tokenizer, "chat_template": config.tokenizer.chat_template})
    if config.batch.sequence_length > config.model.context_length:
        raise UserError(
            f"batch.sequence_length={config.batch.sequence_length}, and {config.init_from} sees"
            f" {config.model.context_length} tokens. Allowed: up to that, or 0 for all of it. Set"
            f" --config.batch.sequence_length={config.model.context_length} or less."
        )
    return config.lock(), source


def _began_from(run_dir: Path) -> str:
    """Return the fingerprint of the model that a run began from; "" where no checkpoint says."""
    for step in reversed(whole_steps(run_dir / "checkpoints")):
        try:
            return read_meta(run_dir / "checkpoints" / str(step)).get("base") or ""
        except (OSError, ValueError):  # a damaged one, which restoring passes over as well
            continue
    return ""


def _check_against(config: ConfigDict, settled: ConfigDict) -> None:
    """Refuse what the user set of the model or the tokenizer where the model of `init_from` has it otherwise."""
    given, theirs, defaults = flatten(config), flatten(settled), flatten(default_config())
    free = ("model.dropout", "tokenizer.chat_template")
    wrong = [
        f"{key}: {value!r} was given, the model has {theirs[key]!r}"
        for key, value in given.items()
        if key.startswith(("model.", "tokenizer.")) and key not in free and value not in (theirs[key], defaults[key])
    ]
    if wrong:
        raise UserError(
            f"the model and the tokenizer are those of init_from={config.init_from}, and the config says otherwise:\n  "
            + "\n  ".join(wrong)
            + "\nLeave these keys out. The length of training sequences is batch.sequence_length."
        )


def devices_of(config: ConfigDict) -> list[jax.Device]:
    """Return the devices of a run: those that share its batch, or its model."""
    return jax.local_devices() if config.parallel == "tensor" else training_devices(config.batch.global_batch_size)


def set_up(config: ConfigDict, data: TokenData, source: Source | None = None) -> Training:
    """Build the parts of a run on this machine, and say what was chosen. Nothing is allocated on the devices yet."""
    shapes = model_config(config.model, data.tokenizer.vocab_size)
    size, length = config.batch.global_batch_size, config.batch.sequence_length or shapes.context_length
    if config.export.require:
        home(shapes)
    tensor = config.parallel == "tensor"
    devices = devices_of(config)
    shared = for_devices(shapes, len(devices)) if tensor else shapes
    runner = TensorParallel(devices, shared) if tensor else Pmap(devices)
    policy = choose_device_policy(config.precision.compute, config.precision.params, devices[0])
    share = size // runner.shares
    rows = max(n for n in range(1, min(config.batch.micro_batch_size, share) + 1) if share % n == 0)
    accumulation = share // rows
    lora = lora_config(config.lora)
    # Where devices share the model XLA divides the form that JAX differentiates; it was not tried with the others.
    wanted = "chunked" if tensor and config.attention == "auto" else config.attention
    attention = choose_attention(wanted, policy.compute, devices[0].platform, compute_capability(devices[0]))
    plain, model = (GPT(c, policy.compute, config.remat, lora, attention) for c in (shapes, shared))
    optimizer = make_optimizer(config.optimizer)
    train_step = make_train_step(
        model,
        policy,
        optimizer,
        learning_rate_schedule(config.optimizer),
        accumulation,
        config.seed,
        config.loss_chunk_tokens,
        config.precision.loss_scale_growth_steps,
        DTYPES[config.precision.gradient_average],
    )

    def init(params: Any = None) -> TrainState:
        return init_state(plain, policy, optimizer, config.seed, config.precision.loss_scale, params)

    chip = describe(devices[0])
    compute = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[np.dtype(policy.compute).name]
    peak = chip.peak_flops[compute]
    batches = make_batches(data, config.seed, size, length, shapes.vocab_size)
    adapters = _count_adapters(shapes, lora)
    trained = f", {format_count(adapters)} trained (LoRA rank {config.lora.rank})" if adapters else ""
    log.info(
        "model: %s parameters%s, layers %d, width %d, context %d, vocabulary %d",
        format_count(count_parameters(shapes)), trained, shapes.n_layers, shapes.d_model, shapes.context_length,
        shapes.vocab_size,
    )  # fmt: skip
    log.info(
        "batch: %d sequences = devices %d x micro-batches %d x %d, %s tokens a step, %.1f epochs in %d steps",
        size, runner.shares, accumulation, rows, format_count(size * length),
        config.optimizer.total_steps * size / batches.n_blocks, config.optimizer.total_steps,
    )  # fmt: skip
    split = f", the model split over {len(devices)}" if tensor else ""
    log.info(
        "device: %s%s, computing in %s%s", chip.name, split, compute, " with loss scaling" if policy.scales_loss else ""
    )
    if policy.param != np.float32 and not adapters:
        log.warning(
            "precision.params=%s: updates smaller than a parameter's last bit are lost, and late in training most are. "
            "fp32 is right for training.", config.precision.params,
        )  # fmt: skip
    return Training(
        model=model,
        policy=policy,
        runner=runner,
        accumulation=accumulation,
        rows=rows,
        sequence_length=length,
        batches=batches,
        val_blocks=validation_blocks(data, length, config.eval.batches * size),
        source=source,
        init=init,
        train_step=runner.train_step(train_step),
        eval_step=runner.eval_step(make_eval_step(model, policy, config.loss_chunk_tokens)),
        flops_per_token=flops_per_token(replace(shapes, context_length=length), adapters),
        peak_flops=peak * len(devices) if peak else None,
        tokens_per_step=size * length,
    )


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


def check_disk(run_dir: Path, abstract: TrainState, checkpoint: ConfigDict) -> None:
    """Refuse before the first step when the checkpoints planned will not fit: those kept, and one being written."""
    planned = checkpoint.keep_last + checkpoint.keep_best + 1
    there = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
    size, free = state_bytes(abstract), shutil.disk_usage(run_dir).free
    if planned * size > free + there:
        raise UserError(
            f"the disk is too small for the checkpoints planned: {planned} of {size / 1e9:.2f} GB"
            f" (keep_last={checkpoint.keep_last}, keep_best={checkpoint.keep_best}, one being written), and"
            f" {free / 1e9:.2f} GB are free at {run_dir}. Set --config.checkpoint.keep_last=1,"
            " --config.checkpoint.keep_best=false, a smaller model, or another --config.out_dir."
        )
