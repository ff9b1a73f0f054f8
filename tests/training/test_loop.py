"""Whole runs on real text: killed, stopped, moved, diverged; what comes out is what an untouched run gives."""

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.errors import TrainingDiverged, UserError
from jgpt.parallel.replicate import Replicate
from jgpt.run_dir import checkpoint
from jgpt.run_dir.manifest import digest, whole_steps
from jgpt.training import start as start_module
from jgpt.training.hooks import health
from jgpt.training.loop import EXIT_SECONDS
from jgpt.training.start import train
from jgpt.training.stop import Stop

REPOSITORY = Path(__file__).parents[2]
STEPS = 12
OF_THE_RUN = ("step", "tokens", "loss", "val_loss", "bits_per_byte", "grad_norm", "learning_rate", "loss_scale")

Command = Callable[..., list[str]]
Start = Callable[[list[str], Path], subprocess.Popen]

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture
def environment() -> Iterator[None]:
    """Training sets variables for the libraries below it: they are put back."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    numbers = np.random.default_rng(0).integers(0, 1000, 700)
    (directory / "text.txt").write_text(
        "".join(f"{i}: {n} + {i} = {n + i}, so they say.\n" for i, n in enumerate(numbers))
    )
    return directory


@pytest.fixture(scope="module")
def flat(text: Path) -> dict[str, Any]:
    """Two micro-batches of two rows on each of two devices, dropout on, a checkpoint every 3 steps."""
    return {
        "data.text_glob": str(text / "*.txt"), "data.cache_dir": str(text / "tokens"), "tokenizer.kind": "char",
        "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 32, "model.context_length": 32, "model.dropout": 0.1,
        "optimizer.total_steps": STEPS, "optimizer.warmup_steps": 2, "batch.global_batch_size": 8,
        "execution.micro_batch_size": 2, "log_every_steps": 1, "eval.every_steps": 4, "eval.batches": 1,
        "sample.every_steps": 0, "sample.num_samples": 1, "sample.max_new_tokens": 6,
        "checkpoint.every_steps": 3, "checkpoint.every_minutes": 0.0,
    }  # fmt: skip


@pytest.fixture
def config(flat: dict[str, Any], tmp_path: Path) -> Callable[..., ConfigDict]:
    """Make that config with changes; the run directory is `tmp_path`/run."""

    def make(**changes: Any) -> ConfigDict:
        made = default_config()
        made.update_from_flattened_dict(flat | {"out_dir": str(tmp_path / "run")} | changes)
        return made

    return make


@pytest.fixture(scope="module")
def command(flat: dict[str, Any]) -> Command:
    """Return the command line of that config."""

    def line(out_dir: Path, **changes: Any) -> list[str]:
        overrides = [f"--config.{key}={value}" for key, value in (flat | {"out_dir": out_dir} | changes).items()]
        config_file = REPOSITORY / "configs" / "base.py"
        return [sys.executable, "-m", "jgpt.train", "--config", str(config_file), *overrides]

    return line


@pytest.fixture(scope="module")
def start() -> Start:
    """Start a process with two devices."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "2"}

    def started(line: list[str], cwd: Path) -> subprocess.Popen:
        return subprocess.Popen(
            line, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return started


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in OF_THE_RUN if key in line} for line in lines]


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def arrays(run_dir: Path, step: int = STEPS) -> Any:
    """Return the contents of a checkpoint."""
    import orbax.checkpoint as ocp

    directory = run_dir / "checkpoints" / str(step)
    return [ocp.StandardCheckpointer().restore(directory / item) for item in ("params", "training")]


def assert_same_run(a: Path, b: Path) -> None:
    """Every number of every step, the samples, and the last state, bit for bit."""
    assert metrics(a) == metrics(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()
    for x, y in zip(*(jax.tree.leaves(arrays(run)) for run in (a, b)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def full(command: Command, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without interruption, once."""
    root = tmp_path_factory.mktemp("full")
    code, output = finish(start(command(root / "run"), root))
    assert code == 0, output
    return root / "run"


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


def test_killed_and_started_again(full: Path, command: Command, start: Start, tmp_path: Path):
    """Kill -9 some time after a checkpoint: the same command makes the untouched run of it, from start to end."""
    line = command(tmp_path / "run")
    process = start(line, tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "3.sha256", process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert status(tmp_path / "run")["state"] == "running"
    code, output = finish(start(line, tmp_path))
    assert code == 0 and "resuming from step" in output, output
    assert_same_run(full, tmp_path / "run")


def test_sigterm_and_its_resume_command(full: Path, command: Command, start: Start, tmp_path: Path):
    process = start(command(tmp_path / "run", **{"checkpoint.every_steps": 1000}), tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    found = status(tmp_path / "run")
    assert code == 0 and found["state"] == "stopped" and found["reason"] == "SIGTERM", output
    assert 0 < found["step"] < STEPS and whole_steps(tmp_path / "run" / "checkpoints") == [found["step"]]
    assert found["resume_command"] in output
    python, *rest = shlex.split(found["resume_command"])
    assert python == "python"
    code, output = finish(start([sys.executable, *rest], tmp_path))
    assert code == 0 and f"resuming from step {found['step']}" in output, output
    assert_same_run(full, tmp_path / "run")


def stop_after(step: int) -> Any:
    """Return a patch that stops a run as a signal would, after so many calls of the loop."""
    calls = iter([""] * (step - 1) + ["test"])
    return mock.patch.object(Stop, "reason", lambda self, margin=0.0: next(calls))


def test_deadline(config: Callable[..., ConfigDict], tmp_path: Path):
    """Nearer than the time to leave: one step, saved, stopped."""
    train(config(deadline_hours=0.001), "go on")
    found = status(tmp_path / "run")
    assert (found["state"], found["step"], found["resume_command"]) == ("stopped", 1, "go on")
    assert "deadline" in found["reason"] and whole_steps(tmp_path / "run" / "checkpoints") == [1]


def test_the_time_that_saving_needs_is_guessed_and_then_measured(config: Callable[..., ConfigDict]):
    """At a byte a second a save would take hours; the first real one shows that it does not."""
    margins: list[float] = []

    def reason(self: Stop, margin_seconds: float = 0.0) -> str:
        margins.append(margin_seconds)
        return ""

    guess = mock.patch.object(checkpoint, "SAVE_BYTES_PER_SECOND", 1.0)
    with guess, mock.patch.object(Stop, "reason", reason):
        train(config())
    assert len(margins) == STEPS and margins[0] > 10_000
    assert EXIT_SECONDS < margins[-1] < 1000


def test_killed_before_the_first_checkpoint_begins_anew(full: Path, copy: Path, config: Callable[..., ConfigDict]):
    """Its metrics and samples as well: nothing is there twice."""
    shutil.rmtree(copy / "checkpoints")
    train(config())
    assert [line["step"] for line in metrics(copy)] == list(range(STEPS + 1))
    assert_same_run(full, copy)


def test_damaged_last_checkpoint_is_made_again(
    full: Path, copy: Path, config: Callable[..., ConfigDict], caplog: pytest.LogCaptureFixture
):
    largest = max((copy / "checkpoints" / "12").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with caplog.at_level(logging.INFO, "jgpt"):
        train(config())
    assert "checkpoint 12 is damaged and passed over" in caplog.text and "resuming from step 9" in caplog.text
    assert_same_run(full, copy)


def test_other_devices(config: Callable[..., ConfigDict], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Two devices, then one, then two: the same batches, sums rounded otherwise."""
    train(config(out_dir=str(tmp_path / "two"), **{"model.dropout": 0.0}))
    changing = config(**{"model.dropout": 0.0})
    with stop_after(4):
        train(changing)
    one = jax.local_devices()[:1]
    with stop_after(4), mock.patch.object(start_module, "training_devices", lambda config: one):
        with caplog.at_level(logging.INFO, "jgpt"):
            train(changing)
    assert "saved on 2 devices, going on with 1" in caplog.text
    train(changing)
    assert len(metrics(tmp_path / "run")) == STEPS + 1
    for key in ("loss", "val_loss", "grad_norm"):
        a, b = ([line[key] for line in metrics(tmp_path / name) if key in line] for name in ("run", "two"))
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_finished_run_is_left_as_it_is_and_can_go_on(copy: Path, config: Callable[..., ConfigDict]):
    kept = ("metrics.jsonl", "samples.txt", "versions.json")
    before = [(copy / name).read_bytes() for name in kept], digest(copy / "checkpoints")
    train(config())
    assert ([(copy / name).read_bytes() for name in kept], digest(copy / "checkpoints")) == before
    assert status(copy)["state"] == "finished"
    train(config(**{"optimizer.total_steps": STEPS + 3}))
    assert [line["step"] for line in metrics(copy)] == list(range(STEPS + 4))
    assert status(copy)["step"] == STEPS + 3 and whole_steps(copy / "checkpoints")[-1] == STEPS + 3


def test_fp16_with_loss_scaling(config: Callable[..., ConfigDict], tmp_path: Path):
    """The scale is in the metrics and in the checkpoint: a run stopped half-way goes on with it, bit for bit."""
    changes = {"precision.compute": "fp16", "precision.loss_scale": 2.0**15, "precision.loss_scale_growth_steps": 4}
    changes |= {"optimizer.learning_rate": 5e-3, "optimizer.min_learning_rate": 5e-3}
    train(config(out_dir=str(tmp_path / "full"), **changes))
    with stop_after(6):
        train(config(**changes))
    train(config(**changes))
    assert_same_run(tmp_path / "full", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[1]["loss"] - 0.2
    assert [line["loss_scale"] for line in lines[1:9]] == [2.0**15] * 4 + [2.0**16] * 4
    assert all(line["skipped_steps"] == 0 for line in lines[1:])


def test_from_fp32_to_fp16_begins_with_the_configured_scale(copy: Path, config: Callable[..., ConfigDict]):
    """A run that needed no scale has 1 in its checkpoint, where small fp16 gradients would be lost."""
    train(config(**{"optimizer.total_steps": STEPS + 2, "precision.compute": "fp16", "precision.loss_scale": 512.0}))
    assert [line.get("loss_scale") for line in metrics(copy)[-3:]] == [None, 512.0, 512.0]


def test_divergence(copy: Path, config: Callable[..., ConfigDict]):
    """A parameter that became NaN: no step changes anything, and after some the run gives up, its checkpoints good."""
    place = Replicate.place_state

    def poison(self: Any, state: Any) -> Any:
        table = np.array(state.params["wte"]["embedding"])
        table[:] = np.nan
        return place(self, state._replace(params=state.params | {"wte": {"embedding": table}}))

    patched = (
        mock.patch.object(Replicate, "place_state", poison),
        mock.patch.object(health, "MAX_SKIPPED_IN_A_ROW", 3),
    )
    before = digest(copy / "checkpoints" / "12")
    with patched[0], patched[1], pytest.raises(TrainingDiverged, match="not finite in 3 steps in a row, up to step 15"):
        train(config(**{"optimizer.total_steps": STEPS + 3, "checkpoint.every_steps": 100}))
    assert status(copy)["state"] == "failed" and "TrainingDiverged" in status(copy)["reason"]
    assert digest(copy / "checkpoints" / "12") == before
    train(config(**{"optimizer.total_steps": STEPS + 3}))
    assert [line["step"] for line in metrics(copy)] == list(range(STEPS + 4))


def test_divergence_exits_with_4(command: Command, start: Start, tmp_path: Path):
    """For real: fp16 and an absurd learning rate."""
    changes = {"precision.compute": "fp16", "optimizer.learning_rate": 10, "optimizer.total_steps": 400}
    changes |= {
        "optimizer.clip_norm": 0,
        "optimizer.warmup_steps": 0,
        "eval.every_steps": 1000,
        "sample.every_steps": 0,
    }
    changes |= {
        "checkpoint.every_steps": 1000,
        "log_every_steps": 100,
        "model.dropout": 0.0,
        "optimizer.weight_decay": 0,
    }
    code, output = finish(start(command(tmp_path / "run", **changes), tmp_path))
    assert code == 4 and "training has diverged" in output and "Traceback" not in output, output
    assert status(tmp_path / "run")["state"] == "failed"


def test_another_model_is_refused_and_nothing_touched(copy: Path, config: Callable[..., ConfigDict]):
    before = digest(copy)
    with pytest.raises(UserError, match=r"(?s)model.n_layers: 1 -> 2.*tokenizer.kind: 'char' -> 'bpe'"):
        train(config(**{"model.n_layers": 2, "tokenizer.kind": "bpe", "seed": 1}))
    with pytest.raises(UserError, match="checkpoint.resume='never'"):
        train(config(**{"checkpoint.resume": "never"}))
    assert digest(copy) == before


def test_resume_must(copy: Path, config: Callable[..., ConfigDict], tmp_path: Path):
    train(config(**{"checkpoint.resume": "must"}))
    with pytest.raises(UserError, match="checkpoint.resume='must', and .* holds no run"):
        train(config(out_dir=str(tmp_path / "new"), **{"checkpoint.resume": "must"}))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="holds no whole checkpoint yet"):
        train(config(**{"checkpoint.resume": "must"}))


def test_a_failed_save_ends_the_run_with_the_reason(copy: Path, config: Callable[..., ConfigDict]):
    """The disk fills up: the run says so, and its earlier checkpoints are whole."""
    import orbax.checkpoint as ocp

    full_disk = mock.patch.object(
        ocp.CheckpointManager, "save", side_effect=ValueError("RESOURCE_EXHAUSTED: No space left on device")
    )
    with full_disk, pytest.raises(UserError, match="could not be written .*No space left on device"):
        train(config(**{"optimizer.total_steps": STEPS + 3}))
    assert status(copy)["state"] == "failed" and "No space left" in status(copy)["reason"]
    train(config(**{"optimizer.total_steps": STEPS + 3}))
    assert status(copy)["state"] == "finished"


@pytest.fixture
def from_full(full: Path, config: Callable[..., ConfigDict], tmp_path: Path) -> Callable[..., ConfigDict]:
    """Make a config that begins from a copy of the untouched run, of which it says no more than that."""
    base = shutil.copytree(full, tmp_path / "base")
    plain = {"tokenizer.kind": "bpe", "init_from": str(base), "data.cache_dir": "", "model.dropout": 0.0}
    return lambda **changes: config(**(plain | changes))


LORA = {"lora.rank": 2, "lora.dropout": 0.1, "optimizer.learning_rate": 1e-2, "batch.sequence_length": 16}


def test_a_full_fine_tune_begins_at_the_source_and_does_not_need_it_again(
    full: Path, from_full: Callable[..., ConfigDict], tmp_path: Path
):
    train(from_full(out_dir=str(tmp_path / "tuned")))
    assert metrics(tmp_path / "tuned")[0]["val_loss"] == metrics(full)[-1]["val_loss"]
    with stop_after(5):
        train(from_full())
    shutil.rmtree(tmp_path / "base")
    train(from_full())
    assert_same_run(tmp_path / "tuned", tmp_path / "run")
    with pytest.raises(UserError, match=r"(?s)init_from: .*base' -> ''"):
        train(from_full(init_from="", **{"tokenizer.kind": "hf", "tokenizer.pretrained": str(tmp_path / "run")}))


def test_lora_stopped_and_started_again(full: Path, from_full: Callable[..., ConfigDict], tmp_path: Path):
    """Bit for bit, its base unchanged, also where that has moved; another base is refused."""
    before = digest(tmp_path / "base")
    train(from_full(out_dir=str(tmp_path / "whole"), **LORA))
    with stop_after(5):
        train(from_full(**LORA))
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    train(from_full(**{**LORA, "init_from": str(moved)}))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.02
    assert digest(moved).replace("moved/", "base/") == before
    other = shutil.copytree(full, tmp_path / "other")
    (other / "checkpoints" / "12.sha256").unlink()  # the one before is another model
    with pytest.raises(UserError, match="holds another model than the one that this run began from"):
        train(from_full(**{**LORA, "init_from": str(other)}))
    with pytest.raises(UserError, match="lora.rank: 2 -> 4"):
        train(from_full(**{**LORA, "init_from": str(moved), "lora.rank": 4}))


def test_lora_on_a_base_that_both_devices_share(from_full: Callable[..., ConfigDict], tmp_path: Path):
    """The same run as with a copy on each, and its checkpoint goes on there."""
    changes = {**LORA, "lora.dropout": 0.0}
    train(from_full(out_dir=str(tmp_path / "copies"), **changes))
    with stop_after(6):
        train(from_full(**changes | {"execution.parallel": "tensor"}))
    a, b = ([line["loss"] for line in metrics(tmp_path / name) if "loss" in line][:6] for name in ("copies", "run"))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    train(from_full(**changes))
    for key in ("loss", "val_loss", "grad_norm"):
        a, b = ([line[key] for line in metrics(tmp_path / name) if key in line] for name in ("copies", "run"))
        np.testing.assert_allclose(a, b, rtol=1e-3)
