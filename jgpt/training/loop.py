"""The loop: a config in, a trained run directory out. It goes on where the run directory left off.

In the data path: it calls everything else, in order. Once in a while it evaluates, samples, saves or stops; otherwise
it dispatches a step and, while the devices are busy with it, looks at the numbers of the step before.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jgpt.config.check import check
from jgpt.data.corpus import Corpus
from jgpt.data.find_files import find_files
from jgpt.data.prefetch import Prefetcher
from jgpt.data.write_tokens import prepare
from jgpt.errors import OutOfMemory
from jgpt.hardware.process import keep_compiled_programs, set_up_process
from jgpt.loading.adopt import adopt_source
from jgpt.model.shapes import model_config
from jgpt.parallel.build import choose_device_policy, devices_of
from jgpt.planning.auto import choose_execution, with_execution_of_run
from jgpt.planning.devices import this_machine
from jgpt.planning.search import check_parameters_fit
from jgpt.run_dir.checkpoint import SAVE_BYTES_PER_SECOND
from jgpt.run_dir.identity import look_for_run, open_run_dir, write_identity
from jgpt.step.train_step import Numbers
from jgpt.training.run import Run
from jgpt.training.setup import check_disk, set_up
from jgpt.training.stop import Stop
from jgpt.wording import format_duration

EXIT_SECONDS = 10.0  # what leaving takes beside the save: samples, plots, the interpreter's end

log = logging.getLogger("jgpt")


def train(config: ConfigDict, command: str = "", on_saved: Callable[[Path, int], None] | None = None) -> None:
    """Train until `optimizer.total_steps`, a signal or the deadline; save; say how it ended in status.json.

    `command` is what a user would type to go on. `on_saved(run directory, step)` is called in a background thread once
    a checkpoint is whole; it should be quick, as the next save waits for it, and must not raise.

    Raises UserError for what the user can mend, before the first step wherever it can be known, OutOfMemory and
    TrainingDiverged.
    """
    try:
        return _train(config, command, on_saved)
    except OutOfMemory as error:
        message = str(error)
    # Another one: the frames of the first hold the arrays on the devices, and a notebook keeps the last error.
    raise OutOfMemory(message)


def _train(config: ConfigDict, command: str, on_saved: Callable[[Path, int], None] | None) -> None:
    stop = Stop(config.deadline_hours)
    set_up_process()
    files = find_files(config.data.text_glob)
    plain = not any(file.suffix in (".gz", ".zst", ".parquet") for file in files)  # else a file says little of its text
    check(config, Corpus(files, config.data.text_field, config.data.encoding_errors).n_bytes if plain else None)
    with open_run_dir(config.out_dir) as run_dir:
        config, source = adopt_source(config, run_dir)
        config = with_execution_of_run(config, run_dir)
        resuming = look_for_run(run_dir, config)
        p, devices = config.precision, devices_of(config)
        choose_device_policy(p.compute, p.params, devices[0])  # refuse before the long work
        target = this_machine(devices)
        if target.chip.memory_bytes:  # of its own; what a CPU's programs leave each other is a guess
            check_parameters_fit(config, model_config(config.model, 1), target)
        keep_compiled_programs()
        data = prepare(config, run_dir / "tokenizer" if resuming else None)
        config = choose_execution(config, model_config(config.model, data.tokenizer.vocab_size), devices)
        training = set_up(config, data, source)
        abstract = jax.eval_shape(training.init)
        check_disk(run_dir, abstract, config.checkpoint)
        if not resuming:
            data.tokenizer.save(run_dir / "tokenizer", config.model.context_length)
        write_identity(run_dir, config)
        run = Run(config, run_dir, command, data, training, on_saved)
        try:
            with stop:  # not before: preparing the text may be interrupted at any time
                run.start(abstract)
                loop(run, stop)
        except BaseException as error:
            message = run.out_of_memory(error)
            told = OutOfMemory(message) if message else error
            with suppress(OSError):  # on a full disk: what went wrong first is what is told
                run.status("failed", f"{type(told).__name__}: {str(told).splitlines()[0] if str(told) else ''}")
            if told is error:
                raise
            raise told from error
        finally:
            run.close()


def loop(run: Run, stop: Stop) -> None:
    """Train to the end, or until there is a reason to stop."""
    if run.step >= run.total_steps:
        log.info(
            "this run is done: step %d of %d. To go on, raise --config.optimizer.total_steps",
            run.step,
            run.total_steps,
        )
        run.finish()
        return
    if run.config.deadline_hours:
        log.info(
            "deadline: this will stop within %s, %s of them for saving (%.2f GB at %.0f MB/s, until a save was timed)",
            format_duration(run.config.deadline_hours * 3600), format_duration(run.save_seconds()),
            run.state_bytes / 1e9, SAVE_BYTES_PER_SECOND / 1e6,
        )  # fmt: skip
    if run.step == 0:
        run.write({"step": 0, "tokens": 0} | run.evaluate())
    log.info("compiling the step")
    behind: tuple[int, Numbers] | None = None  # the step whose numbers are not read yet
    first_step, began, longest = run.step + 1, time.monotonic(), 0.0
    with Prefetcher(run.training.batch, run.step) as prefetcher:
        while run.step < run.total_steps:
            run.state, numbers = run.training.train_step(run.state, run.frozen, prefetcher.next(run.step))
            run.step += 1
            run.tokens += run.training.tokens_per_step
            run.val_loss = None
            if behind is not None:
                run.check_health(*behind)  # while the devices are busy with the step just dispatched
            behind = run.step, numbers
            if run.step == first_step:
                jax.block_until_ready(numbers)
                run.throughput.restart(run.step)  # the first step compiled: it says nothing of the others
            else:
                longest = max(longest, time.monotonic() - began)  # of a step and what was done before it
            began = time.monotonic()
            reason = stop.reason(2 * longest + run.save_seconds() + EXIT_SECONDS)

            # Once in a while: log, evaluate, sample, save, stop.
            last = run.step == run.total_steps
            evaluates = last or run.step % run.config.eval.every_steps == 0
            samples = last or (run.config.sample.every_steps and run.step % run.config.sample.every_steps == 0)
            saves = last or bool(reason) or run.due_to_save()
            if evaluates or run.step % run.config.log_every_steps == 0:
                run.check_health(*behind)
                behind = None
                run.report(numbers, evaluates)
            with run.throughput.pause():
                if samples:
                    run.sample()
                if saves:
                    run.save()
            if reason and not last:
                run.finish(reason)
                return
    run.finish()
