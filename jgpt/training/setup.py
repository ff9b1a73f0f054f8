"""What is checked and said before the first step.

In the data path: between the config and the loop; `start.py` is the caller.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jgpt.data.batches import Batch, Batches, ChatBatches, make_batches, validation_blocks
from jgpt.data.chat_template import render
from jgpt.data.find_files import is_packed
from jgpt.data.remote import TextFile
from jgpt.data.token_files import TokenData
from jgpt.data.unknown import name_unknown, unknown_characters
from jgpt.errors import UserError
from jgpt.exchange.families import export_family
from jgpt.hardware.devices import chip_of, choose_device_policy
from jgpt.model.parameters import count_parameters
from jgpt.model.precision import dtype_name
from jgpt.model.shapes import model_config
from jgpt.parallel.build import Parts, make_parts
from jgpt.parallel.hosts import check_same, n_processes
from jgpt.planning.devices import this_machine
from jgpt.planning.search import check_parameters_fit
from jgpt.run_dir.disk import bytes_below, room
from jgpt.wording import format_count

log = logging.getLogger("jgpt")


def text_bytes(files: Sequence[TextFile]) -> int | None:
    """Return the bytes of text in files; None where they are gone or compressed, so that the text may be longer."""
    if not files or any(map(is_packed, files)):
        return None
    return sum(file.stat().st_size for file in files)


def check_devices(config: ConfigDict, devices: list[jax.Device]) -> None:
    """Refuse, before the long work, a precision that the devices lack, and a model that cannot fit them."""
    choose_device_policy(config.precision.compute, config.precision.params, devices[0])
    target = this_machine(devices)
    if target.chip.memory_bytes:  # accelerators only: how much of a CPU's memory is free cannot be known
        check_parameters_fit(config, model_config(config.model, 1), target)


def check_same_tokens(data: TokenData) -> None:
    """Refuse processes of one run whose tokens differ: each may have made its own, on a disk of its own."""
    meta = data.meta
    check_same(
        {key: str(meta[key])[:12] for key in ("train_sha256", "val_sha256", "tokenizer_sha256") if key in meta},
        "the tokens of their text",
        "All must have the same text (data.text_glob) and the same tokenizer. Copy the text, or data.cache_dir, from"
        " one machine to the others, or put it on a disk that all share.",
    )


@dataclass(frozen=True)
class Setup:
    """What a run trains, and on what: the model with its steps, and the text. Nothing is allocated on the devices."""

    parts: Parts
    data: TokenData
    batches: Batches | ChatBatches
    val_blocks: list[Batch]  # single sequences


def set_up(config: ConfigDict, data: TokenData, devices: list[jax.Device]) -> Setup:
    """Build the parts of a run, and say what was chosen. `config` has no "auto" left. Raises UserError.

    Also refuses, where `export.require` asks for it, a model that no Hugging Face architecture can hold.
    """
    shapes = model_config(config.model, data.tokenizer.vocab_size)
    if config.export.require:
        export_family(shapes)
    parts = make_parts(config, shapes, devices)
    size, length = config.batch.global_batch_size, parts.sequence_length
    length_key = "batch.sequence_length" if config.batch.sequence_length else "model.context_length"
    batches = make_batches(data, config.seed, size, length, shapes.vocab_size, length_key=length_key)
    log_choices(config, parts, batches)
    if note := name_unknown(unknown_characters(data.tokenizer, sample_prompt(config, data)), "sample.prompt"):
        log.warning("%s", note)
    val_blocks = validation_blocks(data, length, config.eval.batches * size, length_key=length_key)
    return Setup(parts, data, batches, val_blocks)


def sample_prompt(config: ConfigDict, data: TokenData) -> str:
    """Return the text before each sample: sample.prompt, in conversations as what a user says.

    Raises UserError where the chat template refuses it.
    """
    prompt = config.sample.prompt
    if not prompt or not data.is_chat:
        return prompt
    settings = data.tokenizer.settings
    return render(settings["chat_template"], settings, [{"role": "user", "content": prompt}], True)


def check_disk(run_dir: Path, size: int, checkpoint: ConfigDict, others: int = 0) -> None:
    """Refuse, before the first step, checkpoints of `size` bytes that will not fit on the disk.

    Room is needed for those kept, `others` among them beside the newest and the best, and one more: the one being
    written. Once training is over, its room serves whoever packs a checkpoint into one file.
    """
    planned = checkpoint.keep_last + checkpoint.keep_best + others + 1
    there = bytes_below(run_dir / "checkpoints")  # they are written over
    available = room(run_dir, checkpoint.disk_gb) + there
    if planned * size > available:
        limit = (
            f", of checkpoint.disk_gb={checkpoint.disk_gb:g} and the disk's free space" if checkpoint.disk_gb else ""
        )
        rest = bytes_below(run_dir) - there
        raise UserError(
            f"the disk is too small for the checkpoints planned: {planned} of {size / 1e9:.2f} GB"
            f" (keep_last={checkpoint.keep_last}, keep_best={checkpoint.keep_best},"
            f"{' one from before the decay,' if others else ''} one being written), and"
            f" {max(0, available) / 1e9:.2f} GB are left for them at {run_dir}{limit}, where other files take"
            f" {rest / 1e9:.2f} GB. Set --config.checkpoint.keep_last=1,"
            " --config.checkpoint.keep_best=false, a smaller model, or another --config.out_dir."
        )


def peak_flops(parts: Parts) -> float | None:
    """Return the most FLOP/s that all devices together can do in the compute dtype; None where it is not known."""
    peak = chip_of(parts.strategy.devices[0]).peak_flops[dtype_name(parts.policy.compute)]
    return peak * len(parts.strategy.devices) if peak else None


def log_choices(config: ConfigDict, parts: Parts, batches: Batches | ChatBatches) -> None:
    """Say what was chosen: the model, the batch, the devices."""
    shapes, policy, devices = parts.shapes, parts.policy, parts.strategy.devices
    trained = f", {format_count(parts.adapters)} trained (LoRA rank {config.lora.rank})" if parts.adapters else ""
    log.info(
        "model: %s parameters%s, layers %d, width %d, context %d, vocabulary %d",
        format_count(count_parameters(shapes)), trained, shapes.n_layers, shapes.d_model, shapes.context_length,
        shapes.vocab_size,
    )  # fmt: skip
    size, steps = config.batch.global_batch_size, config.optimizer.total_steps
    length = f"{steps * size / batches.n_blocks:.1f} epochs in {steps} steps" if steps else "as many steps as time has"
    log.info(
        "batch: %d sequences = devices %d x micro-batches %d x %d, %s tokens a step, %s",
        size, parts.strategy.shares, parts.accumulation, parts.rows, format_count(parts.tokens_per_step), length,
    )  # fmt: skip
    group = len(devices) // parts.strategy.shares
    split = f", the model split over {group}" if group > 1 else ""
    scaling = " with loss scaling" if policy.scales_loss else ""
    together = f", in {n_processes()} processes" if n_processes() > 1 else ""
    log.info(
        "device: %s%s, computing in %s%s%s",
        chip_of(devices[0]).name, split, dtype_name(policy.compute), scaling, together,
    )  # fmt: skip
    if policy.param != np.float32 and not parts.adapters:
        log.warning(
            "precision.params=%s: updates smaller than a parameter's last bit are lost, and late in training most are. "
            "fp32 is right for training.", config.precision.params,
        )  # fmt: skip
