"""Hours or epochs instead of steps: settle how many steps `optimizer.budget_hours` and `budget_epochs` hold.

In the data path: after the parts of a run are built, and before its state is. Epochs are counted. For hours the first
steps are measured: the real ones, on real batches, but of a state that is thrown away: the run then begins from step 0,
knowing its length.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.model.parameters import abstract_stored, path_names
from jgpt.parallel.build import Parts, make_parts
from jgpt.parallel.hosts import first_decides
from jgpt.planning.budget import USED, steps_that_fit
from jgpt.run_dir.checkpoint import SAVE_BYTES_PER_SECOND
from jgpt.run_dir.identity import read_config
from jgpt.training.setup import Setup
from jgpt.waiting import waiting
from jgpt.wording import format_count, format_duration

PROBE_STEPS, PROBE_SECONDS = 3, 15.0  # both at least, but for a run of minutes a share of it in seconds
PROBE_SHARE = 0.02
SMALL_TEXT_TOKENS, BOOK_TOKENS = 50_000, 200_000
MANY_EPOCHS = 4.0  # repeated so often, text teaches almost as if it were new (Muennighoff et al., arXiv 2305.16264)

clock = time.monotonic
log = logging.getLogger("jgpt")


def with_steps_of_run(config: ConfigDict, run_dir: Path) -> ConfigDict:
    """Return a config that leaves its steps open with those that the run in `run_dir` has settled, if one is there."""
    if config.optimizer.total_steps or not (run_dir / "config.json").is_file():
        return config
    before = read_config(run_dir).optimizer
    for name in ("budget_hours", "budget_epochs"):
        if before[name] != config.optimizer[name]:
            log.info(
                "optimizer.%s=%g: this run's %d steps stay, which were settled at its start (then %g). To change them"
                " set --config.optimizer.total_steps=N", name, config.optimizer[name], before.total_steps, before[name],
            )  # fmt: skip
    config = _with_steps(config, before.total_steps)
    with config.unlocked():  # what the steps were settled from stays beside them, for whoever starts the run next
        config.optimizer.update(budget_hours=before.budget_hours, budget_epochs=before.budget_epochs)
    return config.lock()


def settle_steps(config: ConfigDict, setup: Setup, started: float) -> tuple[ConfigDict, Setup]:
    """Return config and setup with `total_steps` settled; both unchanged where it is given.

    `started` is when the process began its work, on the clock of `time.monotonic`. Raises UserError where the hours or
    the epochs are too few.
    """
    o = config.optimizer
    if o.total_steps:
        return config, setup
    of_epochs = int(o.budget_epochs * setup.batches.n_blocks / config.batch.global_batch_size)
    of_hours = _steps_of_hours(config, setup, started) if o.budget_hours else of_epochs
    steps = min(of_hours, of_epochs) if o.budget_epochs else of_hours
    if o.budget_epochs and of_epochs <= o.warmup_steps:
        raise UserError(
            f"optimizer.budget_epochs={o.budget_epochs:g} of {setup.batches.n_blocks} sequences hold {of_epochs} steps,"
            f" and {o.warmup_steps} are for the warmup. Allowed: epochs for more steps than that. Give more text, or"
            " set more --config.optimizer.budget_epochs or fewer --config.optimizer.warmup_steps."
        )
    _say(config, setup, steps)
    config = _with_steps(config, steps)
    return config, replace(setup, parts=make_parts(config, setup.parts.shapes, setup.parts.strategy.devices))


def _steps_of_hours(config: ConfigDict, setup: Setup, started: float) -> int:
    """Measure the first steps; return how many fit in `budget_hours`."""
    hours, parts = config.optimizer.budget_hours, setup.parts
    log.info("optimizer.total_steps=auto: measuring the first steps")
    measured = _measure(config, setup)
    save_seconds = 2 * parts.state_bytes / SAVE_BYTES_PER_SECOND
    start_seconds = clock() - started + measured.compiling + save_seconds
    steps = first_decides(
        lambda: steps_that_fit(
            hours,
            measured.step,
            evaluation_seconds=measured.evaluation,
            evaluate_every=config.eval.every_steps,
            start_seconds=start_seconds,
            session_hours=config.deadline_hours,
        )
    )
    if steps <= config.optimizer.warmup_steps:
        raise UserError(
            f"optimizer.budget_hours={hours:g} ({format_duration(3600 * hours)}) holds {steps} steps of"
            f" {format_duration(measured.step)} here, as the start alone takes {format_duration(start_seconds)}"
            f" (reading, compiling, saving), and {config.optimizer.warmup_steps} are for the warmup. Allowed: hours for"
            " more steps than that. Set more --config.optimizer.budget_hours, fewer --config.optimizer.warmup_steps, or"
            " a smaller --config.batch.global_batch_size."
        )
    log.info(
        "%s hold %d steps: measured %s tokens/s and %s for an evaluation; starts, saving and %.0f%% spare are taken"
        " off", format_duration(3600 * hours), steps, format_count(parts.tokens_per_step / measured.step),
        format_duration(measured.evaluation), 100 * (1 - USED),
    )  # fmt: skip
    return steps


def _with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.optimizer.total_steps = steps
    return config.lock()


@dataclass(frozen=True)
class _Measured:
    """Seconds."""

    compiling: float  # of the step, once
    step: float
    evaluation: float  # of all validation blocks


def _measure(config: ConfigDict, setup: Setup) -> _Measured:
    """Run some steps and a part of an evaluation on a new state, which is thrown away."""
    parts = setup.parts
    state, frozen = parts.first_state(), _stand_in(parts)
    began = clock()
    with waiting("compiling the step"):
        state, numbers = parts.train_step(state, frozen, parts.own_batch(setup.batches, 0))
        jax.block_until_ready(numbers)
    compiled = clock()
    steps, enough = 0, min(PROBE_SECONDS, PROBE_SHARE * 3600 * config.optimizer.budget_hours)
    while steps < PROBE_STEPS or first_decides(lambda: clock() - compiled < enough):
        steps += 1
        state, numbers = parts.train_step(state, frozen, parts.own_batch(setup.batches, steps))
        jax.block_until_ready(numbers)
    step = (clock() - compiled) / steps

    blocks = setup.val_blocks[: 4 * parts.rows * parts.strategy.shares]

    with waiting("compiling the evaluation"):
        parts.evaluate(state.params, frozen, blocks)
    evaluation_began = clock()
    parts.evaluate(state.params, frozen, blocks)
    seconds = (clock() - evaluation_began) * len(setup.val_blocks) / len(blocks)
    return _Measured(max(0.0, compiled - began - step), step, seconds)


def _stand_in(parts: Parts) -> Any:
    """Return zeros in the place of LoRA's base parameters, which take as long and need no file; {} without LoRA."""
    if parts.model.lora is None:
        return {}

    def zeros(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        return parts.strategy.place_param(path_names(path), np.zeros(leaf.shape, leaf.dtype))

    return jax.tree_util.tree_map_with_path(zeros, abstract_stored(parts.shapes, parts.policy.compute))


def _say(config: ConfigDict, setup: Setup, steps: int) -> None:
    """Say what was settled; warn where the text is small for it, or for the model."""
    o, n_tokens = config.optimizer, steps * setup.parts.tokens_per_step
    epochs = steps * config.batch.global_batch_size / setup.batches.n_blocks
    log.info("optimizer.total_steps=%d: %s tokens, %.1f epochs", steps, format_count(n_tokens), epochs)
    if o.budget_hours and not o.budget_epochs and epochs > MANY_EPOCHS:
        log.warning(
            "the text is small for %g hours: it is read %.0f times, and after about %.0f times it teaches little that"
            " is new. Give more text, a smaller --config.optimizer.budget_hours, or a larger model, and watch where the"
            " validation loss turns up", o.budget_hours, epochs, MANY_EPOCHS,
        )  # fmt: skip
    if setup.batches.tokens_per_epoch < SMALL_TEXT_TOKENS:
        log.warning(
            "the text is small: %s tokens. The model will learn it by heart, more than it learns from it. Give it more:"
            " a book has about %s tokens", format_count(setup.batches.tokens_per_epoch), format_count(BOOK_TOKENS),
        )  # fmt: skip
