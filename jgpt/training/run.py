"""One process's part of a run: the state, and everything that is said and written about it.

In the data path: what the loop moves forward; behind it stand the checkpoints, the logs and the run directory.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jgpt.data.chat_template import render
from jgpt.data.token_files import TokenData
from jgpt.errors import TrainingDiverged, UserError
from jgpt.hardware.memory import shortage
from jgpt.inference.decode import NonFiniteLogits, generate
from jgpt.inference.sampling import Sampling
from jgpt.parallel.evaluation import bits_per_byte, evaluate
from jgpt.planning.remedies import EVALUATING, PLACING, SAMPLING, SAVING, TRAINING, explain
from jgpt.report.curves import write_curves
from jgpt.report.page import write_report
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.identity import write_status
from jgpt.run_dir.metrics_file import MetricsLog
from jgpt.run_dir.samples import append_samples, drop_samples_after
from jgpt.step.state import TrainState, state_bytes
from jgpt.step.train_step import Numbers, variables
from jgpt.training.progress import Progress, Throughput
from jgpt.training.setup import Training

MOST_SKIPS_IN_A_ROW = 50  # of steps whose gradient is not finite: more will not mend themselves
log = logging.getLogger("jgpt")


class Run:
    """One process's part of a run: the state, and everything that is written about it."""

    def __init__(
        self,
        config: ConfigDict,
        run_dir: Path,
        command: str,
        data: TokenData,
        training: Training,
        on_saved: Callable[[Path, int], None] | None = None,
    ) -> None:
        self.config, self.run_dir, self.command = config, run_dir, command
        self.data, self.training = data, training
        self.total_steps = config.optimizer.total_steps
        c = config.checkpoint
        self.checkpoints = Checkpoints(run_dir, c.keep_last, c.keep_best, c.disk_gb, on_saved)
        self.state_bytes = 0
        self.state: TrainState
        self.frozen: Any = {}  # the base parameters under LoRA's adapters
        source = training.source
        self.base = source.fingerprint if source else None  # the model that this run began from
        self.stop_ids = source.stop_ids if source else (data.tokenizer.eot_id,)
        self.step = 0
        self.tokens = 0
        self.elapsed_before = 0.0  # seconds of the run's earlier processes
        self.started = time.monotonic()
        self.last_save = time.monotonic()
        self.saved_step = -1
        self.val_loss: float | None = None  # at this very step
        self.doing = PLACING  # what a shortage of memory is told with
        self.opened: list[Any] = [self.checkpoints]

    def start(self, abstract: TrainState) -> None:
        """Restore the newest whole checkpoint, or make the first state; open the logs behind it."""
        self.state_bytes = state_bytes(abstract)
        device = self.training.runner.devices[0]
        restored = self.checkpoints.restore(abstract, device)
        if restored is None:
            if self.config.checkpoint.resume == "must":
                raise UserError(
                    f"checkpoint.resume='must', and {self.run_dir} holds no whole checkpoint yet. Set it to auto."
                )
            state = self.training.first_state()
        else:
            state, meta = restored
            self.step, self.tokens, self.elapsed_before = meta["step"], meta["tokens"], meta["elapsed_seconds"]
            self.val_loss, self.saved_step = meta["val_loss"], meta["step"]
            self.base = meta.get("base")
            self.stop_ids = tuple(meta.get("stop_ids") or self.stop_ids)
            log.info("resuming from step %d of %d", self.step, self.total_steps)
            self._warn_of_differences(meta)
            if self.training.policy.scales_loss and not meta["scales_loss"]:  # computed in fp32 or bf16 so far
                scale = jnp.float32(self.config.precision.loss_scale)
                state = state._replace(loss_scale=state.loss_scale._replace(scale=scale))
        self.state = self.training.runner.place_state(state)
        self.frozen = self.training.frozen()
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
        self.doing = TRAINING
        self.status("running", "")

    def out_of_memory(self, error: BaseException, doing: str = "") -> str:
        """Say what did not fit, and what would; "" where an error has another reason."""
        found, on_host = shortage(error, self.training.runner.devices[0]), isinstance(error, MemoryError)
        return found and explain(found, doing or self.doing, on_host, self.config, self.training, self.command)

    def _warn_of_differences(self, meta: dict[str, Any]) -> None:
        """Say where what follows is not bit for bit what the earlier process would have done."""
        if meta["train_sha256"] != self.data.meta["train_sha256"]:
            log.warning("the text has changed since this run began: its next batches are not those it would have seen")
        if meta["devices"] != len(self.training.runner.devices):
            log.info(
                "saved on %d devices, going on with %d: the same batches in the same order, sums rounded differently",
                meta["devices"], len(self.training.runner.devices),
            )  # fmt: skip

    def save_seconds(self) -> float:
        """Return what stopping takes: the save that may be under way, and the last one."""
        return 2 * self.checkpoints.expected_seconds(self.state_bytes)

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
        t, self.doing = self.training, EVALUATING
        with self.throughput.pause():
            loss, _ = evaluate(
                t.runner,
                t.eval_step,
                self.state.params,
                self.frozen,
                t.val_blocks,
                t.rows,
                t.sequence_length,
            )
        self.val_loss, self.doing = loss, TRAINING
        data = self.data
        return {"val_loss": loss, "bits_per_byte": bits_per_byte(loss, data.val_targets, data.meta["val_bytes"])}

    def sample(self) -> None:
        """Let the model write; the text goes to the log and to samples.txt."""
        c, tokenizer = self.config.sample, self.data.tokenizer
        if not c.num_samples:
            return
        text = c.prompt
        if text and self.data.is_chat:  # it is what a user says
            settings = tokenizer.settings
            text = render(settings["chat_template"], settings, [{"role": "user", "content": text}], True)
        prompt = tokenizer.encode(text).tolist() if text else [tokenizer.eot_id]
        try:
            texts = generate(
                self.training.model,
                variables(self.training.model, *self.training.runner.on_first((self.state.params, self.frozen))),
                [prompt] * c.num_samples,
                sampling=Sampling(c.temperature, c.top_k, c.top_p, c.min_p),
                max_new_tokens=c.max_new_tokens,
                stop_ids=self.stop_ids,
                n_ids=tokenizer.vocab_size,
                seed=self.config.seed,
            )
        except (NonFiniteLogits, jax.errors.JaxRuntimeError) as error:  # no reason to lose a run
            reason = str(error) if isinstance(error, NonFiniteLogits) else self.out_of_memory(error, SAMPLING)
            if not reason:
                raise
            log.warning("no samples at step %d: %s", self.step, reason)
            return
        decoded = [text + tokenizer.decode(ids) for ids in texts]
        append_samples(self.run_dir / "samples.txt", self.step, self.val_loss, decoded)
        log.info(
            "%s", "\n".join(f"--- sample {i} at step {self.step} ---\n{text}" for i, text in enumerate(decoded, 1))
        )
        log.info("---")

    def save(self) -> None:
        """Begin to save the state of this step, if it is not saved yet."""
        if self.saved_step == self.step:
            return
        self.doing = SAVING
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
                "base": self.base,
                "stop_ids": list(self.stop_ids),
            },
        )
        self.saved_step, self.last_save, self.doing = self.step, time.monotonic(), TRAINING
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
