"""What a config takes on a device before it runs there: memory, speed, hours, disk.

Beside the data path: `jgpt.plan` makes a plan here, and `page.py` writes it as text. No text of the user is read, and
no step runs.
"""

import math
import os.path
from collections.abc import Callable
from dataclasses import dataclass

from ml_collections import ConfigDict

from jgpt.config.files import user_path
from jgpt.data.published import load_pretrained
from jgpt.hardware.chips import NETWORK
from jgpt.loading.adopt import adopt_source
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.parallel.devices import batch_shares, training_devices
from jgpt.planning.auto import is_auto
from jgpt.planning.budget import steps_that_fit
from jgpt.planning.devices import THIS, Target, compile_only, this_machine
from jgpt.planning.estimate import Estimate, estimate
from jgpt.planning.execution import Execution, execution_of
from jgpt.planning.gather import with_gather
from jgpt.planning.search import Search, check_parameters_fit, refusal, search

GPT2_IDS = 50_257
CHARACTERS = 128  # ids of a char tokenizer, at most, for English prose


@dataclass(frozen=True)
class Plan:
    """One config on one target: the step that was compiled, and what follows from it."""

    config: ConfigDict
    target: Target
    vocabulary: str  # where the number of ids comes from
    found: Estimate  # of the config as it is, or of the best execution where it was searched for
    searched: Search[Estimate] | None
    run_hours: float  # that a run may take; 0: no limit
    weekly_hours: float  # that a week has; 0: no limit

    @property
    def fits(self) -> bool:
        """Tell whether a step fits; true where nobody knows how much memory there is."""
        return self.target.memory_bytes is None or self.found.peak <= self.target.memory_bytes

    @property
    def hours(self) -> float | None:
        """Hours of all steps of the config; evaluation, samples and saving come on top."""
        seconds, steps = self.found.seconds, self.steps
        return None if seconds is None or steps is None else seconds * steps / 3600

    @property
    def steps(self) -> int | None:
        """Steps of the run: the config's or, where it gives hours, those that they hold at the predicted speed."""
        o, seconds = self.config.optimizer, self.found.seconds
        if o.total_steps or seconds is None:
            return o.total_steps or None
        return steps_that_fit(o.budget_hours, seconds) if o.budget_hours else None

    @property
    def runs(self) -> int | None:
        """Count the runs that these hours take; None where nothing limits a run."""
        return None if self.hours is None or not self.longest_run else math.ceil(self.hours / self.longest_run)

    @property
    def longest_run(self) -> float:
        """Hours of a run at most: its deadline, or what a run may take; 0 without a limit."""
        return self.config.deadline_hours or self.run_hours

    @property
    def checkpoints(self) -> tuple[int, int]:
        """Return how many checkpoints lie on disk at most, with one being written, and the bytes of each."""
        c = self.config.checkpoint
        before_decay = self.config.optimizer.schedule == "wsd"
        return c.keep_last + c.keep_best + before_decay + 1, self.found.parts.state_bytes

    @property
    def advice(self) -> Execution | None:
        """Return the execution to take instead of the config's own: the fastest that fits; None without a search."""
        best = self.searched.best() if self.searched else None
        return best.execution if best else None

    def refusal(self) -> str:
        """Say by how much nothing fits."""
        assert self.searched is not None
        return refusal(self.searched, self.config, self.target)


def make_plan(
    config: ConfigDict,
    device: str,
    *,
    hosts: int = 1,
    network: float = NETWORK,
    tune: bool,
    run_hours: float,
    weekly_hours: float,
    on_compiled: Callable[[Estimate], None],
) -> Plan:
    """Compile the step of a config for a device of `devices.TARGETS`, or "this" machine's. Raises UserError.

    A device of `TARGETS` is one of so many `hosts`, each of which sends `network` bytes a second to the others.

    The keys of `execution` that the config leaves open are searched for, and with `tune` all of them. Where the config
    does not fit as it is, its micro-batch and remat are searched for. `on_compiled` is called after each compile. A run
    takes `run_hours` at most, and a week has `weekly_hours` of them; 0 where there is no such limit.
    """
    target = None if device == THIS else compile_only(device, hosts, network)
    config, source = adopt_source(config, user_path(config.out_dir).absolute())
    ids, vocabulary = (source.tokenizer.vocab_size, "of init_from") if source else vocabulary_of(config)
    shapes = model_config(config.model, ids)
    target = target or this_machine(training_devices(config))
    batch_shares(config, len(target.devices), "plan for another --device")  # refuses what training would
    config = with_gather(config, shapes, target)

    def plan(found: Estimate, searched: Search[Estimate] | None) -> Plan:
        return Plan(config, target, vocabulary, found, searched, run_hours, weekly_hours)

    if tune or is_auto(config):
        return plan(*_search(config, shapes, target, on_compiled, tune))
    check_parameters_fit(config, shapes, target)  # a search does so itself
    found = estimate(config, shapes, target)
    if plan(found, None).fits:
        return plan(found, None)
    on_compiled(found)
    opened = execution_of(config)._replace(micro_batch_size=0, remat="auto").put_into(config)
    return plan(found, _search(opened, shapes, target, on_compiled, everything=False)[1])


def _search(
    config: ConfigDict, shapes: ModelConfig, target: Target, on_compiled: Callable[[Estimate], None], everything: bool
) -> tuple[Estimate, Search[Estimate]]:
    """Search; return the fastest that fits, else the smallest, and the search."""
    found = search(config, shapes, target, on_compiled, everything)
    return found.best() or found.smallest(), found


def vocabulary_of(config: ConfigDict) -> tuple[int, str]:
    """Return how many ids the tokenizer of a config has, and how that is known. Nothing is downloaded."""
    t = config.tokenizer
    if config.model.vocab_size:
        return 1, "of model.vocab_size"
    if t.kind == "bpe":
        return t.vocab_size, "of tokenizer.vocab_size; little text gives fewer"
    if t.kind == "char":
        return CHARACTERS, f"{CHARACTERS} characters assumed"
    if os.path.isdir(user_path(t.pretrained)):
        return load_pretrained(t.pretrained).vocab_size, "of the tokenizer"
    assumed = "GPT-2's" if "gpt2" in t.pretrained else "GPT-2's assumed; set model.vocab_size for another"
    return GPT2_IDS, assumed
