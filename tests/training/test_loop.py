"""Whole runs on real text: killed, stopped, moved, diverged; what comes out is what an untouched run gives."""

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import assert_close, assert_same_run, metrics, status, stop_after

from jgpt.config.defaults import default_config
from jgpt.errors import TrainingDiverged, UserError
from jgpt.run_dir import checkpoint
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.manifest import digest, read_meta, verify, whole_steps
from jgpt.training import start as start_module
from jgpt.training.hooks import health as health_module
from jgpt.training.hooks.health import Health
from jgpt.training.hooks.save import Save
from jgpt.training.loop import EXIT_SECONDS
from jgpt.training.start import train
from jgpt.training.stop import Stop

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
MORE = {"optimizer.total_steps": STEPS + 3}  # one number for all that go on: a step is compiled for its schedule

Make = Callable[..., ConfigDict]
Arguments = Callable[..., list[str]]

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture
def environment() -> Iterator[None]:
    """Training sets variables for the libraries below it: they are put back."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two micro-batches of two rows on each of two devices, dropout on, a checkpoint every 3 steps."""
    text = tmp_path_factory.mktemp("text")
    numbers = np.random.default_rng(0).integers(0, 1000, 700)
    (text / "text.txt").write_text("".join(f"{i}: {n} + {i} = {n + i}, so they say.\n" for i, n in enumerate(numbers)))
    return {
        "data.text_glob": str(text / "*.txt"), "data.cache_dir": str(text / "tokens"), "tokenizer.kind": "char",
        "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 32, "model.context_length": 32, "model.dropout": 0.1,
        "optimizer.total_steps": STEPS, "optimizer.warmup_steps": 2, "batch.global_batch_size": 8,
        "execution.micro_batch_size": 2, "log_every_steps": 1, "eval.every_steps": 4, "eval.batches": 1,
        "sample.every_steps": 0, "sample.num_samples": 1, "sample.max_new_tokens": 6,
        "checkpoint.every_steps": 3, "checkpoint.every_minutes": 0.0,
    }  # fmt: skip


@pytest.fixture
def config(flat: dict[str, Any], tmp_path: Path) -> Make:
    """Make that config with changes; the run directory is `tmp_path`/run."""

    def make(**changes: Any) -> ConfigDict:
        made = default_config()
        made.update_from_flattened_dict(flat | {"out_dir": str(tmp_path / "run")} | changes)
        return made

    return make


@pytest.fixture(scope="module")
def arguments(flat: dict[str, Any]) -> Arguments:
    """Return the arguments that give jgpt.train that config with changes."""
    base = f"--config={REPOSITORY / 'tests' / 'defaults.py'}"
    return lambda out_dir, **changes: [
        base, *(f"--config.{key}={value}" for key, value in (flat | {"out_dir": out_dir} | changes).items())
    ]  # fmt: skip


@pytest.fixture(scope="module")
def full(command: Any, arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without interruption, once."""
    run_dir = tmp_path_factory.mktemp("full") / "run"
    result = command("train", *arguments(run_dir))
    assert result.code == 0, result.err
    return run_dir


@pytest.fixture
def copy(full: Path, tmp_path: Path) -> Path:
    return shutil.copytree(full, tmp_path / "run")


def test_an_untouched_run(full: Path):
    lines = metrics(full)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["tokens"] for line in lines] == [step * 8 * 32 for step in range(STEPS + 1)]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 4, 8, 12]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.05
    assert status(full)["state"] == "finished" and status(full)["step"] == STEPS
    steps = whole_steps(full / "checkpoints")
    assert steps[-2:] == [9, 12]


# A process that is killed as nothing can prevent, some steps after its first checkpoint began, once that is whole.
KILLED = """
import os, runpy, signal, sys, time
from pathlib import Path
from jgpt.training.stop import Stop

manifest, asked = Path(sys.argv.pop(1)), []

def reason(self, margin_seconds=0.0):
    asked.append(margin_seconds)
    if len(asked) == 5:
        while not manifest.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return ""

Stop.reason = reason
runpy.run_module("jgpt.train", run_name="__main__", alter_sys=True)
"""


def test_killed_and_started_again(full: Path, command: Any, arguments: Arguments, tmp_path: Path):
    """The same command makes the untouched run of it, from start to end; in another process than the first."""
    line = arguments(tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "2"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run" / "checkpoints" / "3.sha256"), *line],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert status(tmp_path / "run")["state"] == "running"
    result = command("train", *line)
    assert result.code == 0 and "resuming from step 3" in result.out, result.err
    assert_same_run(full, tmp_path / "run")


def test_sigterm_and_its_resume_command(full: Path, command: Any, arguments: Arguments, tmp_path: Path):
    asked, reason = [], Stop.reason

    def interrupted(self: Stop, margin_seconds: float = 0.0) -> str:
        asked.append(margin_seconds)
        if len(asked) == 5:
            signal.raise_signal(signal.SIGTERM)
        return reason(self, margin_seconds)

    with mock.patch.object(Stop, "reason", interrupted):
        result = command("train", *arguments(tmp_path / "run", **{"checkpoint.every_steps": 1000}))
    found = status(tmp_path / "run")
    assert result.code == 0 and found["state"] == "stopped" and found["reason"] == "SIGTERM", result.err
    assert found["step"] == 5 and whole_steps(tmp_path / "run" / "checkpoints") == [5]
    assert found["resume_command"] in result.out
    python, module, name, *rest = shlex.split(found["resume_command"])
    assert (python, module, name) == ("python", "-m", "jgpt.train")
    result = command("train", *rest)
    assert result.code == 0 and "resuming from step 5" in result.out, result.err
    assert_same_run(full, tmp_path / "run")


def test_deadline(config: Make, tmp_path: Path):
    """Nearer than the time to leave: one step, saved, stopped."""
    train(config(deadline_hours=0.001), "go on")
    found = status(tmp_path / "run")
    assert (found["state"], found["step"], found["resume_command"]) == ("stopped", 1, "go on")
    assert "deadline" in found["reason"] and whole_steps(tmp_path / "run" / "checkpoints") == [1]


def test_the_time_that_saving_needs_is_guessed_and_then_measured(config: Make):
    """At a byte a second a save would take hours; the first real one shows that it does not."""
    margins: list[float] = []

    def reason(self: Stop, margin_seconds: float = 0.0) -> str:
        margins.append(margin_seconds)
        return "test" if margin_seconds < 10_000 else ""

    guess = mock.patch.object(checkpoint, "SAVE_BYTES_PER_SECOND", 1.0)
    with guess, mock.patch.object(Stop, "reason", reason):
        train(config())
    assert 3 < len(margins) <= STEPS and margins[0] > 10_000  # the first save is that of step 3
    assert EXIT_SECONDS < margins[-1] < 10_000


def test_killed_before_the_first_checkpoint_starts_from_scratch(full: Path, copy: Path, config: Make):
    """Its metrics and samples as well: nothing is there twice."""
    shutil.rmtree(copy / "checkpoints")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:6]))
    train(config())
    assert [line["step"] for line in metrics(copy)] == list(range(STEPS + 1))
    assert_same_run(full, copy)


def test_damaged_last_checkpoint_is_made_again(full: Path, copy: Path, config: Make, caplog: pytest.LogCaptureFixture):
    largest = max((copy / "checkpoints" / "12").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with caplog.at_level(logging.INFO, "jgpt"):
        train(config())
    assert "checkpoint 12 is damaged and passed over" in caplog.text and "resuming from step 9" in caplog.text
    assert_same_run(full, copy)


def test_other_devices(trained: Path, own_run: Path, command: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    """Two devices, then one, then two: the same batches, sums rounded otherwise."""
    shutil.rmtree(own_run / "checkpoints" / "4")
    (own_run / "checkpoints" / "4.sha256").unlink()
    with stop_after(1), monkeypatch.context() as patch:
        patch.setattr(start_module, "training_devices", lambda config: jax.local_devices()[:1])
        result = command("train", *tiny)
    assert "saved on 2 devices, going on with 1" in result.out and status(own_run)["step"] == 3, result.err
    assert command("train", *tiny).code == 0
    assert len(metrics(own_run)) == 5
    assert_close(own_run, trained, rtol=1e-4)


def test_the_state_may_be_split_and_copied_again(trained: Path, own_run: Path, command: Any, tiny: list[str]):
    """A copy on each device, then split over both, then copies again: the same run."""
    shutil.rmtree(own_run / "checkpoints" / "4")
    (own_run / "checkpoints" / "4.sha256").unlink()
    with stop_after(1):
        result = command("train", *tiny, "--config.execution.parallel=fsdp")
    assert status(own_run)["step"] == 3, result.err
    assert command("train", *tiny).code == 0
    assert_close(own_run, trained, rtol=1e-4)


def test_a_finished_run_is_left_as_it_is_and_can_go_on(copy: Path, config: Make):
    kept = ("metrics.jsonl", "samples.txt", "versions.json")
    before = [(copy / name).read_bytes() for name in kept], digest(copy / "checkpoints")
    train(config(**{"checkpoint.resume": "must"}))
    assert ([(copy / name).read_bytes() for name in kept], digest(copy / "checkpoints")) == before
    assert status(copy)["state"] == "finished"
    train(config(**MORE))
    assert [line["step"] for line in metrics(copy)] == list(range(STEPS + 4))
    assert status(copy)["step"] == STEPS + 3 and whole_steps(copy / "checkpoints")[-1] == STEPS + 3


def test_from_fp32_to_fp16_with_loss_scaling(copy: Path, config: Make):
    """It starts with the configured scale: a run that needed none has 1 in its checkpoint, where small gradients would
    be lost. The scale and the count of good steps are in the checkpoints of fp16: stopped between two doublings, it
    goes on as if it had not been.
    """
    changes = {"precision.compute": "fp16", "precision.loss_scale": 2.0**15, "precision.loss_scale_growth_steps": 4}
    changes |= {"optimizer.total_steps": STEPS + 9, "sample.num_samples": 0}
    with stop_after(6):
        train(config(**changes))
    assert [line["step"] for line in metrics(copy)] == list(range(STEPS + 7))
    train(config(**changes))
    lines, scales = metrics(copy), [None, 2.0**15] + [2.0**16] * 4 + [2.0**17] * 4  # good steps of fp32 count as well
    assert [line.get("loss_scale") for line in lines[STEPS:]] == scales
    assert lines[-1]["val_loss"] < lines[STEPS]["val_loss"]


def test_divergence(copy: Path, command: Any, arguments: Arguments):
    """A parameter that became NaN: no step changes anything, and after some the run gives up, its checkpoints good."""
    restore = Checkpoints.restore

    def poisoned(self: Checkpoints, abstract: Any, shardings: Any) -> Any:
        restored = restore(self, abstract, shardings)
        assert restored is not None
        params = restored[0].params
        params["wte"]["embedding"] *= np.float32(np.nan)
        return restored

    before = digest(copy / "checkpoints")
    with mock.patch.object(Checkpoints, "restore", poisoned), mock.patch.object(health_module, "MAX_IN_A_ROW", 3):
        result = command("train", *arguments(copy, **MORE, **{"checkpoint.every_steps": 100}))
    assert result.code == 4 and "training has diverged" in result.err and "Traceback" not in result.err, result.err
    assert "not finite in 3 steps in a row, up to step 15" in result.err
    assert status(copy)["state"] == "failed" and TrainingDiverged.__name__ in status(copy)["reason"]
    assert digest(copy / "checkpoints") == before


def test_manifests_that_are_gone_are_no_reason_to_begin_again(copy: Path, command: Any, arguments: Arguments):
    """Nobody judged those checkpoints. Without any, the metrics tell that there were some."""
    for manifest in (copy / "checkpoints").glob("*.sha256"):
        manifest.unlink()
    before = digest(copy)
    result = command("train", *arguments(copy))
    assert result.code == 2 and "without their manifests (STEP.sha256)" in result.err, result.err
    made = re.search(r"make its manifest: (cd .* > 12.sha256)\.", result.err)
    assert made and digest(copy) == before
    subprocess.run(made[1], shell=True, check=True)
    assert verify(copy / "checkpoints", 12) == "" and command("train", *arguments(copy)).code == 0
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_bytes()
    result = command("train", *arguments(copy))
    assert result.code == 2 and "holds a run that reached step 12 (metrics.jsonl)" in result.err, result.err
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_another_model_is_refused_and_nothing_touched(copy: Path, config: Make):
    before = digest(copy)
    with pytest.raises(UserError, match=r"(?s)model.n_layers: 1 -> 2.*tokenizer.kind: 'char' -> 'bpe'"):
        train(config(**{"model.n_layers": 2, "tokenizer.kind": "bpe", "seed": 1}))
    with pytest.raises(UserError, match="checkpoint.resume='never'"):
        train(config(**{"checkpoint.resume": "never"}))
    assert digest(copy) == before


def test_resume_must(copy: Path, config: Make, tmp_path: Path):
    with pytest.raises(UserError, match="checkpoint.resume='must', and .* holds no run"):
        train(config(out_dir=str(tmp_path / "new"), **{"checkpoint.resume": "must"}))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="holds no run that has saved a checkpoint"):
        train(config(**{"checkpoint.resume": "must"}))


def test_a_failed_save_ends_the_run_with_the_reason(copy: Path, config: Make):
    """The disk fills up: the run says so, and its earlier checkpoints are whole."""
    import orbax.checkpoint as ocp

    full_disk = mock.patch.object(
        ocp.CheckpointManager, "save", side_effect=ValueError("RESOURCE_EXHAUSTED: No space left on device")
    )
    before = digest(copy / "checkpoints")
    with full_disk, pytest.raises(UserError, match="could not be written .*No space left on device"):
        train(config(**MORE, **{"sample.num_samples": 0}))
    assert status(copy)["state"] == "failed" and "No space left" in status(copy)["reason"]
    assert digest(copy / "checkpoints") == before


def finite_and_as_recorded(run: Path, command: Any) -> None:
    """Assert that the newest checkpoint of a run evaluates at the loss that it recorded, and writes text."""
    directory = run / "checkpoints"
    recorded = read_meta(directory, whole_steps(directory)[-1])["val_loss"]
    result = command("evaluate", f"--run_dir={run}")
    found = re.search(r"^loss +([\d.]+)", result.out, re.MULTILINE)
    assert result.code == 0 and found and float(found[1]) == pytest.approx(recorded, abs=1e-4), result.err
    result = command("generate", f"--run_dir={run}", "--max_new_tokens=3")
    assert result.code == 0 and result.out, result.err


def test_a_run_that_explodes_keeps_the_checkpoints_from_before(own_run: Path, command: Any, tiny: list[str]):
    """Weights that grow a thousandfold each step are finite for a while. Each of these steps would be saved."""
    before = digest(own_run / "checkpoints")
    more = {"optimizer.total_steps": 9, "optimizer.weight_decay": 1e6, "checkpoint.every_steps": 1}
    result = command("train", *tiny, *(f"--config.{key}={value}" for key, value in more.items()))
    assert result.code == 4 and "training has diverged" in result.err and "Traceback" not in result.err, result.err
    assert "The newest checkpoint is that of step 4, all of it finite, with the loss" in result.err
    assert status(own_run)["state"] == "failed" and digest(own_run / "checkpoints") == before
    finite_and_as_recorded(own_run, command)


def test_a_run_that_explodes_at_once_saves_nothing(command: Any, tiny: list[str], tmp_path: Path):
    """AdamW without eps divides zero by zero: a gradient that is finite makes parameters that are not."""
    more = {"precision.compute": "fp16", "optimizer.eps": 0.0, "optimizer.learning_rate": 10.0}
    more |= {"optimizer.total_steps": 100, "checkpoint.every_steps": 1, "eval.every_steps": 1000}
    result = command("train", *tiny, *(f"--config.{key}={value}" for key, value in more.items()))
    assert result.code == 4 and "training has diverged" in result.err, result.err
    assert "No checkpoint was saved." in result.err and not whole_steps(tmp_path / "run" / "checkpoints")


def test_a_step_that_is_not_good_is_saved_later(config: Make, caplog: pytest.LogCaptureFixture):
    """The save of step 3 waits for the first good step, and that is said once."""
    saved, losses = [], iter([99.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    with mock.patch.object(Save, "_try", lambda self, run: next(losses)), caplog.at_level(logging.WARNING, "jgpt"):
        train(config(), on_saved=lambda run_dir, step: saved.append(step))
    assert saved == [5, 6, 9, 12]
    (warning,) = [line for line in caplog.messages if "is not saved" in line]
    assert warning.startswith("step 3 is not saved: the loss is 99, and was")
    with mock.patch.object(Save, "_try", lambda self, run: 99.0):
        with pytest.raises(TrainingDiverged, match=r"diverged at the last step, 15, .* newest .* is that of step 12,"):
            train(config(**MORE))


def test_what_a_good_step_is():
    """Finite; not far above the lowest of late; not back at a guess, unless that is near."""
    run = SimpleNamespace(parts=SimpleNamespace(strategy=SimpleNamespace(on_host=lambda numbers: numbers)))

    def read(health: Health, *losses: float, skipped: int = 0) -> list[str]:
        numbers = [{"loss": loss, "skipped_in_a_row": skipped, "loss_scale": 1.0} for loss in losses]
        return [health.read(run, step, one) or health.exploding or health.skipped for step, one in enumerate(numbers)]  # type: ignore[arg-type]

    health = Health(50_000)  # ln 50,000 is 10.8
    assert read(health, 10.9, 11.5, 4.0, 6.9) == [""] * 4
    assert read(health, 7.1, float("nan"), float("inf")) == [
        "the loss is 7.1, and was 4 within the last 100 steps", "the loss is nan", "the loss is inf"
    ]  # fmt: skip
    assert read(health, 4.5, skipped=1) == ["the gradient is not finite"] and read(health, 4.5) == [""]
    assert Health(64, 3.9).too_high(4.8) == "" and Health(64, 3.9).too_high(5.0) and Health(64, 2.5).too_high(4.2)
    assert Health(64).too_high(99.0) == ""  # there is nothing to compare it with
    assert not any("diverged" in text for text in read(health, *[9.0] * 49))
    assert "so it went for 50 steps, up to step 0: training has diverged" in read(health, 9.0)[0]
