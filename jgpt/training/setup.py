"""From a config to everything that a run needs.

In the data path: between the token files, or the model that `init_from` names, and the loop.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jgpt.data.batches import Batch, Batches, ChatBatches, make_batches, validation_blocks
from jgpt.data.token_files import TokenData
from jgpt.errors import UserError
from jgpt.exchange.families import export_family
from jgpt.hardware.devices import describe
from jgpt.loading.source import Source, load_params
from jgpt.model.parameters import count_parameters
from jgpt.model.shapes import model_config
from jgpt.parallel.build import Parts, devices_of, make_parts
from jgpt.run_dir.disk import bytes_below, room
from jgpt.step.state import TrainState, state_bytes
from jgpt.wording import format_count

log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class Training(Parts):
    """The parts of a run: what the loop calls, and the numbers that it reports with."""

    batches: Batches | ChatBatches
    val_blocks: list[Batch]  # single sequences
    source: Source | None  # the model that `init_from` names, where its parameters are needed
    peak_flops: float | None  # of all devices

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


def set_up(config: ConfigDict, data: TokenData, source: Source | None = None) -> Training:
    """Build the parts of a run on this machine, and say what was chosen. Nothing is allocated on the devices yet."""
    shapes = model_config(config.model, data.tokenizer.vocab_size)
    if config.export.require:
        export_family(shapes)
    devices = devices_of(config)
    parts = make_parts(config, shapes, devices)
    size, length, policy = config.batch.global_batch_size, parts.sequence_length, parts.policy
    chip = describe(devices[0])
    compute = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[np.dtype(policy.compute).name]
    peak = chip.peak_flops[compute]
    length_key = "batch.sequence_length" if config.batch.sequence_length else "model.context_length"
    batches = make_batches(data, config.seed, size, length, shapes.vocab_size, length_key=length_key)
    trained = f", {format_count(parts.adapters)} trained (LoRA rank {config.lora.rank})" if parts.adapters else ""
    log.info(
        "model: %s parameters%s, layers %d, width %d, context %d, vocabulary %d",
        format_count(count_parameters(shapes)), trained, shapes.n_layers, shapes.d_model, shapes.context_length,
        shapes.vocab_size,
    )  # fmt: skip
    log.info(
        "batch: %d sequences = devices %d x micro-batches %d x %d, %s tokens a step, %.1f epochs in %d steps",
        size, parts.runner.shares, parts.accumulation, parts.rows, format_count(parts.tokens_per_step),
        config.optimizer.total_steps * size / batches.n_blocks, config.optimizer.total_steps,
    )  # fmt: skip
    split = f", the model split over {len(devices)}" if config.execution.parallel == "tensor" else ""
    log.info(
        "device: %s%s, computing in %s%s", chip.name, split, compute, " with loss scaling" if policy.scales_loss else ""
    )
    if policy.param != np.float32 and not parts.adapters:
        log.warning(
            "precision.params=%s: updates smaller than a parameter's last bit are lost, and late in training most are. "
            "fp32 is right for training.", config.precision.params,
        )  # fmt: skip
    return Training(
        **vars(parts),
        batches=batches,
        val_blocks=validation_blocks(data, length, config.eval.batches * size, length_key=length_key),
        source=source,
        peak_flops=peak * len(devices) if peak else None,
    )


def check_disk(run_dir: Path, abstract: TrainState, checkpoint: ConfigDict) -> None:
    """Refuse before the first step when the checkpoints planned will not fit: those kept, and one more.

    That is the one being written; once training is over, its room serves whoever packs a checkpoint into one file.
    """
    planned = checkpoint.keep_last + checkpoint.keep_best + 1
    there = bytes_below(run_dir / "checkpoints")  # they are written over
    size, available = state_bytes(abstract), room(run_dir, checkpoint.disk_gb) + there
    if planned * size > available:
        limit = (
            f", of checkpoint.disk_gb={checkpoint.disk_gb:g} and the disk's free space" if checkpoint.disk_gb else ""
        )
        others = bytes_below(run_dir) - there
        raise UserError(
            f"the disk is too small for the checkpoints planned: {planned} of {size / 1e9:.2f} GB"
            f" (keep_last={checkpoint.keep_last}, keep_best={checkpoint.keep_best}, one being written), and"
            f" {max(0, available) / 1e9:.2f} GB are left for them at {run_dir}{limit}, where other files take"
            f" {others / 1e9:.2f} GB. Set --config.checkpoint.keep_last=1,"
            " --config.checkpoint.keep_best=false, a smaller model, or another --config.out_dir."
        )
