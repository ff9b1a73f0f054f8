"""The loop: a config in, a trained run directory out. It goes on where the run directory left off.

In the data path: it calls everything else, in order. Once in a while it evaluates, samples, saves or stops; otherwise
it dispatches a step and, while the devices are busy with it, reads the numbers of the step before.
"""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jgpt.config import UserError, check
from jgpt.data.batches import Prefetcher
from jgpt.data.corpus import Corpus
from jgpt.data.files import find_files
from jgpt.data.memmap import TokenData, prepare
from jgpt.hardware.devices import set_up_process, training_devices
from jgpt.inference.decode import NonFiniteLogits, generate
from jgpt.inference.sampling import Sampling
from jgpt.training.checkpoint import Checkpoints, whole_steps
from jgpt.training.curves import write_curves
from jgpt.training.evaluation import bits_per_byte, evaluate
from jgpt.training.metrics import MetricsLog, Progress, Throughput, format_duration
from jgpt.training.report import write_report
from jgpt.training.run_dir import check_same_run, open_run_dir, write_identity, write_status
from jgpt.training.samples import append_samples, drop_samples_after
from jgpt.training.setup import Training, check_disk, choose_device_policy, set_up
from jgpt.training.step import Numbers, TrainState
from jgpt.training.stop import Stop

MOST_SKIPS_IN_A_ROW = 50  # of steps whose gradient is not finite: more will not mend themselves
EXIT_SECONDS = 10.0  # what leaving takes beside the save: samples, plots, the interpreter's end

log = logging.getLogger("jgpt")


class TrainingDiverged(RuntimeError):
    """The gradient is no longer finite, and neither waiting nor a smaller loss scale helped."""


def train(config: ConfigDict, command: str = "") -> None:
    """Train until `optimizer.total_steps`, a signal or the deadline; save; say how it ended in status.json.

    `command` is what a user would type to go on. Raises UserError for what the user can mend, before the first step
    wherever it can be known, and TrainingDiverged.
    """
    stop = Stop(config.deadline_hours)
    set_up_process()
    files = find_files(config.data.text_glob)
    plain = not any(file.suffix in (".gz", ".zst", ".parquet") for file in files)  # else a file says little of its text
    check(config, Corpus(files, config.data.text_field, config.data.encoding_errors).n_bytes if plain else None)
    with open_run_dir(config.out_dir) as run_dir:
        resuming = _look_for_run(run_dir, config)
        choose_device_policy(config, training_devices(config.batch.global_batch_size)[0])  # refuse before the long work
        data = prepare(config, run_dir / "tokenizer" if resuming else None)
        training = set_up(config, data)
        abstract = jax.eval_shape(training.init)
        check_disk(run_dir, abstract, config.checkpoint)
        if not resuming:
            data.tokenizer.save(run_dir / "tokenizer", config.model.context_length)
        write_identity(run_dir, config)
        run = Run(config, run_dir, command, data, training, stop)
        try:
            with stop:  # not before: preparing the text may be interrupted at any time
                run.start(abstract)
                run.go()
        except BaseException as error:
            with suppress(OSError):  # on a full disk: what went wrong first is what is told
                run.status("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            raise
        finally:
            run.close()


def _look_for_run(run_dir: Path, config: ConfigDict) -> bool:
    """Tell whether `run_dir` holds a run to go on with; raise UserError where checkpoint.resume or that run forbids."""
    resume, parts = config.checkpoint.resume, [run_dir / "config.json", run_dir / "tokenizer" / "tokenizer.json"]
    found = all(part.is_file() for part in parts)
    if not found and whole_steps(run_dir / "checkpoints"):
        missing = " and ".join(str(part) for part in parts if not part.is_file())
        raise UserError(
            f"{run_dir} holds checkpoints, but not {missing}: without it they cannot be read as they were meant. Put it"
            " back, or set another --config.out_dir; nothing was changed."
        )
    if resume == "must" and not found:
        raise UserError(
            f"checkpoint.resume='must', and {run_dir} holds no run. Name the out_dir of one, or set"
            " --config.checkpoint.resume=auto."
        )
    if resume == "never" and found:
        raise UserError(
            f"checkpoint.resume='never', and {run_dir} holds a run, which starting anew would overwrite. Set another "
            "--config.out_dir, or remove that directory yourself."
        )
    if found:
        for change in check_same_run(run_dir, config):
            log.info("changed since this run was last started: %s", change)
    return found


class Run:
    """One process's part of a run: the state, and everything that is written about it."""

    def __init__(
        self, config: ConfigDict, run_dir: Path, command: str, data: TokenData, training: Training, stop: Stop
    ) -> None:
        self.config, self.run_dir, self.command = config, run_dir, command
        self.data, self.training, self.stop = data, training, stop
        self.total_steps = config.optimizer.total_steps
        self.checkpoints = Checkpoints(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
        self.state: TrainState
        self.step = 0
        self.tokens = 0
        self.elapsed_before = 0.0  # seconds of the run's earlier processes
        self.started = time.monotonic()
        self.last_save = time.monotonic()
        self.saved_step = -1
        self.val_loss: float | None = None  # at this very step
        self.opened: list[Any] = [self.checkpoints]

    def start(self, abstract: TrainState) -> None:
        """Restore the newest whole checkpoint, or make the first state; open the logs behind it."""
        device = self.training.runner.devices[0]
        restored = self.checkpoints.restore(abstract, device)
        if restored is None:
            state = jax.jit(self.training.init)()
            if self.config.checkpoint.resume == "must":
                raise UserError(
                    f"checkpoint.resume='must', and {self.run_dir} holds no whole checkpoint yet. Set it to auto."
                )
        else:
            state, meta = restored
            self.step, self.tokens, self.elapsed_before = meta["step"], meta["tokens"], meta["elapsed_seconds"]
            self.val_loss, self.saved_step = meta["val_loss"], meta["step"]
            log.info("resuming from step %d of %d", self.step, self.total_steps)
            self._warn_of_differences(meta)
            if self.training.policy.scales_loss and not meta["scales_loss"]:  # computed in fp32 or bf16 so far
                scale = jnp.float32(self.config.precision.loss_scale)
                state = state._replace(loss_scale=state.loss_scale._replace(scale=scale))
        self.state = self.training.runner.place_state(state)
        # Killed before its first checkpoint, a run begins anew, and so do its metrics.
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", -1 if restored is None else self.step)
        drop_samples_after(self.run_dir / "samples.txt", self.step)
        self.progress = Progress(self.total_steps, self.step)
        self.throughput = Throughput(
            self.total_steps,
            self.step,
            self.training.tokens_per_step,
            self.training.flops_per_token,
            self.training.peak_flops,
        )
        self.opened += [self.metrics, self.progress]
        self.status("running", "")

    def _warn_of_differences(self, meta: dict[str, Any]) -> None:
        """Say where what follows is not bit for bit what the earlier process would have done."""
        if meta["train_sha256"] != self.data.meta["train_sha256"]:
            log.warning("the text has changed since this run began: its next batches are not those it would have seen")
        if meta["devices"] != len(self.training.runner.devices):
            log.info(
                "saved on %d devices, going on with %d: the same batches in the same order, sums rounded differently",
                meta["devices"], len(self.training.runner.devices),
            )  # fmt: skip

    def go(self) -> None:
        """Train to the end, or until there is a reason to stop."""
        if self.step >= self.total_steps:
            log.info(
                "this run is done: step %d of %d. To go on, raise --config.optimizer.total_steps",
                self.step,
                self.total_steps,
            )
            self.finish()
            return
        if self.config.deadline_hours:
            log.info("deadline: this will stop, saved, within %s", format_duration(self.config.deadline_hours * 3600))
        if self.step == 0:
            self.write({"step": 0, "tokens": 0} | self.evaluate())
        log.info("compiling the step")
        behind: tuple[int, Numbers] | None = None  # the step whose numbers are not read yet
        first_step, began, step_seconds = self.step + 1, time.monotonic(), 0.0
        with Prefetcher(self.training.batch, self.step) as prefetcher:
            while self.step < self.total_steps:
                self.state, numbers = self.training.train_step(self.state, prefetcher.next(self.step))
                self.step += 1
                self.tokens += self.training.tokens_per_step
                self.val_loss = None
                if behind is not None:
                    self.check_health(*behind)  # while the devices are busy with the step just dispatched
                behind = self.step, numbers
                if self.step == first_step:
                    jax.block_until_ready(numbers)
                    self.throughput.restart(self.step)  # the first step compiled: it says nothing of the others
                began, step_seconds = time.monotonic(), time.monotonic() - began
                reason = self.stop.reason(2 * step_seconds + 2 * self.checkpoints.save_seconds + EXIT_SECONDS)

                # Once in a while: log, evaluate, sample, save, stop.
                last = self.step == self.total_steps
                evaluates = last or self.step % self.config.eval.every_steps == 0
                samples = last or (self.config.sample.every_steps and self.step % self.config.sample.every_steps == 0)
                saves = last or bool(reason) or self.due_to_save()
                if evaluates or self.step % self.config.log_every_steps == 0:
                    self.check_health(*behind)
                    behind = None
                    self.report(numbers, evaluates)
                with self.throughput.pause():
                    if samples:
                        self.sample()
                    if saves:
                        self.save()
                if reason and not last:
                    self.finish(reason)
                    return
        self.finish()

    def due_to_save(self) -> bool:
        """Tell whether a checkpoint is due, by steps or by the clock."""
        c = self.config.checkpoint
        by_clock = c.every_minutes > 0 and time.monotonic() - self.last_save >= c.every_minutes * 60
        return self.step % c.every_steps == 0 or by_clock

    def check_health(self, step: int, numbers: Numbers) -> None:
        """Fetch the numbers of a step, and raise TrainingDiverged when steps are skipped without end."""
        found = self.training.runner.on_host(numbers)
        in_a_row = int(found["skipped_in_a_row"])
        if in_a_row >= MOST_SKIPS_IN_A_ROW:
            raise TrainingDiverged(
                f"the gradient was not finite in {in_a_row} steps in a row, up to step {step} (loss {found['loss']:g},"
                f" loss scale {found['loss_scale']:g}): training has diverged. No parameter was changed by them, and"
                " the last checkpoint is good. Try a lower --config.optimizer.learning_rate, more warmup_steps, or"
                " --config.precision.compute=fp32."
            )

    def report(self, numbers: Numbers, evaluates: bool) -> None:
        """Report the numbers of this step, and its validation loss where it has one."""
        found = {name: number.item() for name, number in self.training.runner.on_host(numbers).items()}
        speed = self.throughput.measure(self.step)
        scales = self.training.policy.scales_loss
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": found["loss"],
            "learning_rate": found["learning_rate"],
            "grad_norm": found["grad_norm"],
            "loss_scale": found["loss_scale"] if scales else None,
            "skipped_steps": found["skipped_steps"] if scales or found["skipped_steps"] else None,
            "tokens_per_second": speed.tokens_per_second or None,
            "mfu": speed.mfu,
        }
        self.write(record | (self.evaluate() if evaluates else {}), speed.eta_seconds)
        self.progress.update(self.step)
        if evaluates:
            with self.throughput.pause():
                write_curves(self.run_dir)

    def write(self, record: dict[str, Any], eta_seconds: float | None = None) -> None:
        """Put a record into metrics.jsonl and on the terminal."""
        self.metrics.write(record | {"elapsed_seconds": self.elapsed()})
        self.progress.log(record, eta_seconds)

    def evaluate(self) -> dict[str, float]:
        """Return the loss on the validation blocks, and in bits per byte."""
        t = self.training
        with self.throughput.pause():
            loss, _ = evaluate(
                t.runner, t.eval_step, self.state.params, t.val_blocks, t.rows, self.config.model.context_length
            )
        self.val_loss = loss
        meta = self.data.meta
        return {"val_loss": loss, "bits_per_byte": bits_per_byte(loss, meta["val_tokens"], meta["val_bytes"])}

    def sample(self) -> None:
        """Let the model write; the text goes to the log and to samples.txt."""
        c, tokenizer = self.config.sample, self.data.tokenizer
        if not c.num_samples:
            return
        prompt = tokenizer.encode(c.prompt).tolist() if c.prompt else [tokenizer.eot_id]
        try:
            texts = generate(
                self.training.model,
                self.training.runner.on_first(self.state.params),
                [prompt] * c.num_samples,
                sampling=Sampling(c.temperature, c.top_k, c.top_p, c.min_p),
                max_new_tokens=c.max_new_tokens,
                eot_id=tokenizer.eot_id,
                n_ids=tokenizer.vocab_size,
                seed=self.config.seed,
            )
        except NonFiniteLogits as error:  # no reason to lose a run
            log.warning("no samples at step %d: %s", self.step, error)
            return
        decoded = [c.prompt + tokenizer.decode(ids) for ids in texts]
        append_samples(self.run_dir / "samples.txt", self.step, self.val_loss, decoded)
        log.info(
            "%s", "\n".join(f"--- sample {i} at step {self.step} ---\n{text}" for i, text in enumerate(decoded, 1))
        )
        log.info("---")

    def save(self) -> None:
        """Begin to save the state of this step, if it is not saved yet."""
        if self.saved_step == self.step:
            return
        # A copy: the step that follows uses the memory of this state again.
        state = jax.tree.map(np.array, self.training.runner.on_host(self.state))
        self.checkpoints.save(
            state,
            {
                "step": self.step,
                "tokens": self.tokens,
                "elapsed_seconds": self.elapsed(),
                "val_loss": self.val_loss,
                "train_sha256": self.data.meta["train_sha256"],
                "devices": len(self.training.runner.devices),
                "scales_loss": self.training.policy.scales_loss,
            },
        )
        self.saved_step, self.last_save = self.step, time.monotonic()
        self.status("running", "")

    def finish(self, reason: str = "") -> None:
        """Save, draw, and say how the run ended and how it goes on."""
        self.save()
        self.checkpoints.wait()
        self.status("stopped" if reason else "finished", reason or "all steps are done")
        write_curves(self.run_dir)
        write_report(self.run_dir)
        if reason:
            log.info("stopped at step %d of %d: %s. To go on:\n  %s", self.step, self.total_steps, reason, self.command)
        else:
            log.info("finished: %s", self.run_dir)

    def elapsed(self) -> float:
        """Return the seconds that this run has taken, in all its processes."""
        return self.elapsed_before + time.monotonic() - self.started

    def status(self, state: str, reason: str) -> None:
        """Write status.json."""
        write_status(self.run_dir, state, self.step, self.total_steps, reason, self.command)

    def close(self) -> None:
        """Let go of files and threads, whatever happened."""
        for opened in reversed(self.opened):  # the checkpoints last: they raise when a save has failed
            opened.close()
