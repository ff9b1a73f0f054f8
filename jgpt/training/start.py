"""From a config to a trained run directory: the table of contents of training.

In the data path: it calls everything else, in order.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.config.check import check
from jgpt.data.config_text import find_text
from jgpt.data.write_tokens import prepare
from jgpt.errors import OutOfMemory
from jgpt.hardware.process import keep_compiled_programs, set_up_process
from jgpt.loading.adopt import adopt_source
from jgpt.model.shapes import model_config
from jgpt.parallel.devices import training_devices
from jgpt.parallel.hosts import barrier, check_same, connect, first_before_others, is_first
from jgpt.parallel.watch import together
from jgpt.planning.auto import choose_execution, with_execution_of_run
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.identity import comparable, look_for_run, open_run_dir, write_identity
from jgpt.run_dir.manifest import whole_steps
from jgpt.run_dir.metrics_file import drop_all
from jgpt.run_dir.samples import drop_samples_after
from jgpt.run_dir.status_file import write_lost
from jgpt.training.extend import decay_step
from jgpt.training.hooks.health import Health
from jgpt.training.hooks.log import Log
from jgpt.training.hooks.save import Save
from jgpt.training.hooks.trackers import check_trackers
from jgpt.training.loop import loop
from jgpt.training.run import begin
from jgpt.training.settle import settle_steps, with_steps_of_run
from jgpt.training.setup import check_devices, check_disk, check_same_tokens, peak_flops, set_up, text_bytes
from jgpt.training.status import Status, failures_explained
from jgpt.training.stop import Stop
from jgpt.training.try_it import try_command


def train(
    config: ConfigDict,
    command: str = "",
    on_saved: Callable[[Path, int], None] | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> Status:
    """Train until `optimizer.total_steps`, a signal or the deadline; save; say how it ended in status.json.

    A run directory that holds a run goes on from its newest whole checkpoint. Several processes that JAX has connected
    (see `hardware/cluster.py`) train one model: each calls this with the same config. `command` is what a user would
    type to go on. `on_saved(run directory, step)` is called in a background thread once a checkpoint is whole; it
    should be quick, as the next save waits for it, and must not raise. `on_record(record)` is called with each record
    of metrics.jsonl, between two steps; what it raises ends the run as any error does. Both are called in process 0.

    Returns the status of the run. Raises UserError for what the user can fix, before the first step wherever it can be
    known, OutOfMemory and TrainingDiverged.
    """
    stop, started = Stop(config.deadline_hours), time.monotonic()
    set_up_process(config.execution.deterministic)
    try:
        with together(lambda reason: write_lost(config.out_dir, reason, command)):
            return _train(config, command, on_saved, on_record, stop, started)
    except OutOfMemory as error:
        message = str(error)
    # A new one: the frames of the first hold the arrays on the devices, and a notebook keeps the last error.
    raise OutOfMemory(message)


def _train(
    config: ConfigDict,
    command: str,
    on_saved: Callable[[Path, int], None] | None,
    on_record: Callable[[dict[str, Any]], None] | None,
    stop: Stop,
    started: float,
) -> Status:
    check_same(*comparable(config))
    files = find_text(config)
    check(config, text_bytes(files))
    check_trackers(config)
    with open_run_dir(config.out_dir) as run_dir:
        # What the run is: from the config, the model it begins from, the run that is there, and the devices.
        config, source = adopt_source(config, run_dir)
        config = with_execution_of_run(with_steps_of_run(config, run_dir), run_dir)
        resuming = look_for_run(run_dir, config)
        barrier()  # XLA itself does not wait long for the devices of the others, and loading may take longer
        devices = training_devices(config)
        connect(devices)
        check_devices(config, devices)
        keep_compiled_programs()

        # The text, as tokens; then the model and its steps, which need the vocabulary.
        data = first_before_others(lambda: prepare(config, run_dir / "tokenizer" if resuming else None, files))
        check_same_tokens(data)
        config = choose_execution(config, model_config(config.model, data.tokenizer.vocab_size), devices)
        setup = set_up(config, data, devices)
        check_disk(run_dir, setup.parts.state_bytes, config.checkpoint, others=config.optimizer.schedule == "wsd")

        # From here on the run directory is this run's.
        if not resuming and is_first():
            data.tokenizer.save(run_dir / "tokenizer", config.model.context_length)
        status = Status(run_dir, config.optimizer.total_steps, command, try_command(config, data))
        with failures_explained(status, config, setup.parts):
            config, setup = settle_steps(config, setup, started)
        status.total_steps = config.optimizer.total_steps
        if is_first():
            if not whole_steps(run_dir / "checkpoints"):  # before the config says how often this start saves
                drop_all(run_dir / "metrics.jsonl")
            write_identity(run_dir, config)
        c, kept = config.checkpoint, decay_step(config.optimizer)
        checkpoints = Checkpoints(
            run_dir,
            keep_last=c.keep_last,
            keep_best=c.keep_best,
            keep_steps=() if kept is None else (kept,),
            disk_gb=c.disk_gb,
            on_saved=on_saved,
        )
        with (
            checkpoints,
            failures_explained(status, config, setup.parts),
            stop,  # not before: preparing the text may be interrupted at any time
        ):
            run = begin(config, run_dir, setup, source, checkpoints, status)
            if is_first():
                drop_samples_after(run_dir / "samples.txt", run.step)
            with Log(run, peak_flops(setup.parts), on_record) as metrics:
                health = Health(setup.parts.shapes.vocab_size, run.lowest_loss)
                loop(run, metrics, Save(run, checkpoints, health), health, stop)
    return status
