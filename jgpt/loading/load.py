"""Models by name, onto the devices: what generate, chat, evaluate and convert load; and imports of those of others.

Beside the data path: between a finished run, or a model of others, and what uses it.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError
from jgpt.exchange.pretrained import Pretrained
from jgpt.hardware.devices import all_devices, choose_device_policy, local_devices
from jgpt.hardware.process import keep_compiled_programs
from jgpt.inference.placement import Placement, choose_placement
from jgpt.loading.source import is_run, load_params, local_directory, open_source, source_of
from jgpt.model.gpt import GPT
from jgpt.model.precision import DTYPES, Policy
from jgpt.parallel.hosts import connect
from jgpt.parallel.replicate import Replicate
from jgpt.parallel.strategy import Strategy
from jgpt.parallel.tensor_parallel import TensorParallel
from jgpt.run_dir.identity import open_run_dir, write_identity
from jgpt.run_dir.manifest import whole_steps
from jgpt.run_dir.params import save_params
from jgpt.step.eval_step import EvalStep, make_eval_step

RETRIES = 3  # of a run whose checkpoint was deleted while it was read
log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run: `params` lie where its devices want them, matrices in the compute dtype."""

    config: ConfigDict  # of its run; of a model of others the defaults, with its `model`
    model: GPT
    policy: Policy
    placement: Placement  # the devices that hold it
    params: Any
    tokenizer: Tokenizer
    step: int | None
    val_loss: float | None
    stop_ids: tuple[int, ...]
    sampling: dict[str, float]  # the temperature and the like that its publisher advises, where any

    @cached_property
    def evaluation(self) -> tuple[Strategy, EvalStep]:
        """How it is evaluated, on every device that is here; made once, as each new step compiles again.

        In several processes these are the devices of all of them. A model that one device holds is copied to all.
        """
        strategy: Strategy
        if len(self.placement.devices) > 1:
            strategy = TensorParallel(self.placement.devices, self.placement.config)
        else:
            connect(all_devices())
            strategy = Replicate(all_devices())
        step = make_eval_step(self.model, self.policy, self.config.execution.loss_chunk_tokens)
        return strategy, strategy.eval_step(step)


def load_model(
    name: str,
    step: int | None = None,
    compute: str = "auto",
    devices: str = "auto",
    context_length: int = 0,
    rows: int = 1,
    base: str = "",
) -> LoadedModel:
    """Load a model onto the devices: `name` is a run directory, a Hugging Face directory, or a name on its Hub.

    Of a run it is the newest whole checkpoint, or that at `step`. LoRA adapters, of a run or of PEFT, are merged
    into their base, which may have moved to `base`. `devices`, `context_length` (0: the model's) and `rows` (sequences
    at a time) say what must fit: see `inference/placement.py`. Raises UserError when there is no such model, or a
    damaged one.
    """
    for _ in range(RETRIES):
        before = _newest(name)
        try:
            return _load_once(name, step, compute, devices, context_length, rows, base)
        except (UserError, OSError, ValueError):  # Orbax's errors about files that vanish are ValueErrors, too
            if step is not None or _newest(name) <= before:
                raise
        log.info("the run has saved a newer checkpoint while this one was read: taking that")
    return _load_once(name, step, compute, devices, context_length, rows, base)


def _newest(name: str) -> int:
    """Return the newest step of a run, which deletes older ones while it trains; -1 for anything else."""
    directory = local_directory(name)
    return max(whole_steps(directory / "checkpoints"), default=-1) if directory else -1


def _load_once(
    name: str, step: int | None, compute: str, devices: str, context_length: int, rows: int, base: str
) -> LoadedModel:
    source = open_source(name, step, base=base)
    keep_compiled_programs()
    # What a run computed in need not exist here: a model trained in bf16 runs in fp16 on a T4.
    policy = choose_device_policy(compute, "fp32", local_devices()[0])
    longest = source.shapes.context_length
    placement = choose_placement(source.shapes, policy.compute, min(context_length or longest, longest), rows, devices)
    params = load_params(source, policy.compute, placement.place)
    return LoadedModel(
        config=source.config,
        model=GPT(placement.config, policy.compute, activations=policy.activations),
        policy=policy,
        placement=placement,
        params=params,
        tokenizer=source.tokenizer,
        step=source.step,
        val_loss=source.val_loss,
        stop_ids=source.stop_ids,
        sampling=source.sampling,
    )


def import_model(pretrained: Pretrained, run_dir: Path, params: str) -> bool:
    """Write a model of others as a run directory, its matrices in `params` ("fp32", "fp16", "bf16"), vectors in fp32.

    The directory is one to generate with, evaluate and begin from; it has no optimizer state. Returns whether it is a
    chat model. Raises UserError when the directory holds a run already.
    """
    source = source_of(pretrained)
    config = source.config
    config.update({"out_dir": str(run_dir), "precision": {"params": params}})
    with open_run_dir(str(run_dir)) as directory:
        if is_run(directory) and whole_steps(directory / "checkpoints"):
            raise UserError(f"{directory} holds a run or an imported model, which would be lost. Name a new directory.")
        source.tokenizer.save(directory / "tokenizer", source.shapes.context_length)
        write_identity(directory, config)
        tree = load_params(source, DTYPES[params], lambda path, array: array)
        meta = {
            "step": 0,
            "val_loss": None,
            "stop_ids": list(source.stop_ids),
            "tokenizer_sha256": source.tokenizer.sha256,
        }
        save_params(directory / "checkpoints", 0, tree, meta)
    return "chat_template" in source.tokenizer.settings
