"""From a config to everything that a run needs, and from a run directory back to its model.

In the data path: between the token files and the loop; and between a finished run and what uses it.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jgpt.config import UserError
from jgpt.data.batches import Batches, validation_blocks
from jgpt.data.memmap import TokenData
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.hardware.devices import compute_capability, describe, training_devices
from jgpt.model.build import abstract_params, count_parameters, flops_per_token, model_config
from jgpt.model.gpt import GPT
from jgpt.model.precision import Policy, choose_policy
from jgpt.training.checkpoint import read_meta, restore_params, state_bytes, whole_steps
from jgpt.training.metrics import format_count
from jgpt.training.optimizer import learning_rate_schedule, make_optimizer
from jgpt.training.run_dir import read_config
from jgpt.training.step import EvalStep, Pmap, TrainState, TrainStep, init_state, make_eval_step, make_train_step

log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class Training:
    """The parts of a run: what the loop calls, and the numbers that it reports with."""

    model: GPT
    policy: Policy
    runner: Pmap
    accumulation: int  # A
    rows: int  # B: sequences on one device at a time
    batches: Batches
    val_blocks: np.ndarray  # int32 [n, T+1]
    init: Callable[[], TrainState]
    train_step: TrainStep
    eval_step: EvalStep
    flops_per_token: float
    peak_flops: float | None  # of all devices
    tokens_per_step: int

    def batch(self, step: int) -> Any:
        """Return the batch that follows `step` steps, [shares, A, B, ...], on its way to the devices."""
        batch = self.batches.batch(step)
        shape = self.runner.shares, self.accumulation, self.rows, -1
        return self.runner.place_batch(jax.tree.map(lambda x: x.reshape(shape), batch))


def choose_device_policy(config: ConfigDict, device: jax.Device) -> Policy:
    """Resolve the precision group of a config for a device."""
    p = config.precision
    return choose_policy(p.compute, p.params, device.platform, compute_capability(device))


def set_up(config: ConfigDict, data: TokenData) -> Training:
    """Build the parts of a run on this machine, and say what was chosen. Nothing is allocated on the devices yet."""
    shapes = model_config(config.model, data.tokenizer.vocab_size)
    size, length = config.batch.global_batch_size, config.model.context_length
    devices = training_devices(size)
    policy = choose_device_policy(config, devices[0])
    share = size // len(devices)
    rows = max(n for n in range(1, min(config.batch.micro_batch_size, share) + 1) if share % n == 0)
    accumulation = share // rows
    model = GPT(shapes, policy.compute, config.remat)
    optimizer = make_optimizer(config.optimizer)
    runner = Pmap(devices)
    train_step = make_train_step(
        model,
        policy,
        optimizer,
        learning_rate_schedule(config.optimizer),
        accumulation,
        config.seed,
        config.loss_chunk_tokens,
        config.precision.loss_scale_growth_steps,
    )
    chip = describe(devices[0])
    compute = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[np.dtype(policy.compute).name]
    peak = chip.peak_flops[compute]
    batches = Batches(data.train, config.seed, size, length, shapes.vocab_size)
    log.info(
        "model: %s parameters, layers %d, width %d, context %d, vocabulary %d",
        format_count(count_parameters(shapes)), shapes.n_layers, shapes.d_model, length, shapes.vocab_size,
    )  # fmt: skip
    log.info(
        "batch: %d sequences = devices %d x micro-batches %d x %d, %s tokens a step, %.1f epochs in %d steps",
        size, len(devices), accumulation, rows, format_count(size * length),
        config.optimizer.total_steps * size / batches.n_blocks, config.optimizer.total_steps,
    )  # fmt: skip
    log.info("device: %s, computing in %s%s", chip.name, compute, " with loss scaling" if policy.scales_loss else "")
    if policy.param != np.float32:
        log.warning(
            "precision.params=%s: updates smaller than a parameter's last bit are lost, and late in training most are. "
            "fp32 is right for training from scratch.", config.precision.params,
        )  # fmt: skip
    return Training(
        model=model,
        policy=policy,
        runner=runner,
        accumulation=accumulation,
        rows=rows,
        batches=batches,
        val_blocks=validation_blocks(data.val, length, config.eval.batches * size),
        init=lambda: init_state(model, policy, optimizer, config.seed, config.precision.loss_scale),
        train_step=runner.train_step(train_step),
        eval_step=runner.eval_step(make_eval_step(model, policy, config.loss_chunk_tokens)),
        flops_per_token=flops_per_token(shapes),
        peak_flops=peak * len(devices) if peak else None,
        tokens_per_step=size * length,
    )


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


class LoadedRun(NamedTuple):
    """A model that was trained: what `generate` and `evaluate` work with. `params` are on the first device."""

    config: ConfigDict
    model: GPT
    policy: Policy
    params: Any
    tokenizer: Tokenizer
    step: int
    val_loss: float | None


def load_run(run_dir: Path, step: int | None = None) -> LoadedRun:
    """Load the parameters of a run's newest whole checkpoint, or of that at `step`.

    Raises UserError when the directory holds no run, no such checkpoint, or a damaged one.
    """
    run_dir = run_dir.expanduser().absolute()
    checkpoints = run_dir / "checkpoints"
    steps = whole_steps(checkpoints)
    if not (run_dir / "config.json").is_file() or not steps:
        raise UserError(
            f"{run_dir} holds no trained model: it needs config.json, tokenizer/ and a whole checkpoint in"
            " checkpoints/. Name the out_dir of a run that has saved at least once."
        )
    if step is not None and step not in steps:
        raise UserError(
            f"step {step} is not among the checkpoints of {run_dir}. Allowed: {', '.join(map(str, steps))}."
        )
    step = steps[-1] if step is None else step
    config = read_config(run_dir)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    device = jax.local_devices()[0]
    # What a run computed in need not exist here: a model trained in bf16 runs in fp16 on a T4.
    config.precision.compute = "auto"
    policy = choose_device_policy(config, device)
    shapes = model_config(config.model, tokenizer.vocab_size)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, policy.param), abstract_params(shapes))
    params = restore_params(checkpoints, step, params, device)
    val_loss = read_meta(checkpoints / str(step)).get("val_loss")
    return LoadedRun(config, GPT(shapes, policy.compute), policy, params, tokenizer, step, val_loss)
