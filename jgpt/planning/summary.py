"""What a config takes on a device before it is run there: memory, speed, hours, disk.

Beside the data path: `jgpt.plan` asks, `page.py` writes the answer down. No text is read, and no step runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jgpt.data.tokenizer import load_pretrained
from jgpt.errors import UserError
from jgpt.loading.adopt import adopt_source
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.parallel.build import training_devices
from jgpt.planning.auto import is_auto
from jgpt.planning.devices import THIS, Target, compile_only, this_machine
from jgpt.planning.estimate import Choice, Estimate, choice_of, estimate, with_choice
from jgpt.planning.search import Search, check_least, refusal, search
from jgpt.step.state import tree_bytes

GPT2_IDS = 50_257
CHARACTERS = 128  # ids of a char tokenizer, at most, for English prose


@dataclass(frozen=True)
class Plan:
    """One config on one target: the step that was compiled, and what follows from it."""

    config: ConfigDict
    target: Target
    vocabulary: str  # where the number of ids comes from
    found: Estimate  # of the config as it is, or of the best choice where it was searched for
    searched: Search[Estimate] | None
    run_hours: float
    weekly_hours: float

    @property
    def fits(self) -> bool:
        """Tell whether a step fits; true where nobody knows how much memory there is."""
        return self.target.memory_bytes is None or self.found.peak <= self.target.memory_bytes

    @property
    def hours(self) -> float | None:
        """Hours of all steps of the config; evaluation, samples and saving come on top."""
        seconds = self.found.seconds
        return None if seconds is None else seconds * self.config.optimizer.total_steps / 3600

    @property
    def runs(self) -> int | None:
        """Count the runs that these hours take: each as long as its deadline, or as a run may be."""
        longest = self.config.deadline_hours or self.run_hours
        return None if self.hours is None else math.ceil(self.hours / longest)

    @property
    def checkpoints(self) -> tuple[int, int]:
        """Return how many checkpoints lie on disk at most, with one being written, and the bytes of each."""
        c = self.config.checkpoint
        return c.keep_last + c.keep_best + 1, int(tree_bytes(jax.eval_shape(self.found.parts.init)))

    @property
    def advice(self) -> Choice | None:
        """Return the choice to take instead of the config's own: the fastest that fits; None without a search."""
        best = self.searched.best() if self.searched else None
        return best.choice if best else None

    def refusal(self) -> str:
        """Say by how much nothing fits."""
        assert self.searched is not None
        return refusal(self.searched, self.target)


def make_plan(
    config: ConfigDict, device: str, tune: bool, run_hours: float, weekly_hours: float, tell: Callable[[Estimate], None]
) -> Plan:
    """Compile the step of a config for a device of `targets.TARGETS`, or "this" machine's. Raises UserError.

    The choice is searched for where the config leaves it open, and with `tune` wholly. Where the config does not fit
    as it is, its micro-batch and remat are searched for. `tell` hears of each compile. A run takes `run_hours` at most,
    and a week has `weekly_hours` of them.
    """
    target = None if device == THIS else compile_only(device)
    config, source = adopt_source(config, Path(config.out_dir).expanduser().absolute())
    ids, vocabulary = (source.tokenizer.vocab_size, "of init_from") if source else vocabulary_of(config)
    shapes = model_config(config.model, ids)
    target = target or this_machine(training_devices(config))
    _check_shares(config, target)

    def plan(found: Estimate, searched: Search[Estimate] | None) -> Plan:
        return Plan(config, target, vocabulary, found, searched, run_hours, weekly_hours)

    if tune or is_auto(config):
        return plan(*_searched(config, shapes, target, tell, tune))
    check_least(config, shapes, target)  # a search does so itself
    found = estimate(config, shapes, target)
    if plan(found, None).fits:
        return plan(found, None)
    tell(found)
    opened = with_choice(config, choice_of(config)._replace(micro_batch_size=0, remat="auto"))
    return plan(found, _searched(opened, shapes, target, tell, False)[1])


def _searched(
    config: ConfigDict, shapes: ModelConfig, target: Target, tell: Callable[[Estimate], None], everything: bool
) -> tuple[Estimate, Search[Estimate]]:
    """Search, and return the fastest that fits, else the least."""
    found = search(config, shapes, target, tell, everything)
    return found.best() or min(found.tried.values(), key=lambda tried: tried.peak), found


def vocabulary_of(config: ConfigDict) -> tuple[int, str]:
    """Return how many ids the tokenizer of a config has or will have, and how that is known. Nothing is downloaded."""
    t = config.tokenizer
    if config.model.vocab_size:
        return 1, "of model.vocab_size"
    if t.kind == "bpe":
        return t.vocab_size, "of tokenizer.vocab_size; little text gives fewer"
    if t.kind == "char":
        return CHARACTERS, f"{CHARACTERS} characters assumed"
    if Path(t.pretrained).expanduser().is_dir():
        return load_pretrained(t.pretrained).vocab_size, "of the tokenizer"
    assumed = "GPT-2's" if "gpt2" in t.pretrained else "GPT-2's assumed; set model.vocab_size for another"
    return GPT2_IDS, assumed


def _check_shares(config: ConfigDict, target: Target) -> None:
    """Refuse a batch that the devices cannot share equally, as training would."""
    size, n = config.batch.global_batch_size, len(target.devices)
    if config.execution.parallel == "data" and size % n:
        raise UserError(
            f"batch.global_batch_size is {size}, and {target.name} has {n} devices. Each takes the same number of"
            f" sequences, so it must be a multiple of {n}: set --config.batch.global_batch_size="
            f"{max(1, round(size / n)) * n}."
        )
