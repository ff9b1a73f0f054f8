"""Several processes of one run, as real processes that gloo connects, against the same run in one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from conftest import Command
from training.runs import assert_close, metrics, status

from jgpt.errors import UserError
from jgpt.parallel.hosts import (
    Agreement,
    check_same,
    comes_from_others,
    first_before_others,
    first_decides,
    gather_texts,
)
from jgpt.run_dir.manifest import verify, whole_steps

LAUNCHER = Path(__file__).parents[2] / "scripts" / "launch_local.sh"
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1"}
Start = Callable[..., list[subprocess.Popen[str]]]


def test_one_process_waits_for_nobody_and_asks_itself():
    assert gather_texts("text") == ["text"] and first_decides(lambda: {"a": [1]}) == {"a": [1]}
    assert first_before_others(lambda: 7) == 7
    check_same({"a": "1"}, "something", "advice")
    agree = Agreement(jax.local_devices())
    assert [agree(wish) for wish in ("", "SIGTERM", "")] == ["", "SIGTERM", ""]


def test_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch):
    said = [json.dumps({"seed": "1", "same": "x"}), json.dumps({"seed": "2", "same": "x"})]
    monkeypatch.setattr("jgpt.parallel.hosts.gather_texts", lambda text: said)
    with pytest.raises(UserError, match="seed: 2 in process 1, 1 in process 0") as error:
        check_same({}, "their config", "Start them with the same.")
    assert "same: x" not in str(error.value) and str(error.value).endswith("Start them with the same.")


def test_errors_that_another_process_may_have_caused(monkeypatch: pytest.MonkeyPatch):
    collective = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    barrier = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    barrier.__cause__ = collective
    monkeypatch.setattr("jgpt.parallel.hosts.n_processes", lambda: 2)
    assert all(map(comes_from_others, (collective, barrier, ValueError(str(collective)))))  # the last one: jax 0.7
    assert not any(map(comes_from_others, (UserError("a full disk"), ValueError("NOT_FOUND: a file"), TimeoutError())))
    monkeypatch.undo()
    assert not comes_from_others(collective)  # alone


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes of a run, each with its own further arguments; what is left of them is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, own: tuple[list[str], ...] = ([], [])) -> list[subprocess.Popen[str]]:
        for i, further in enumerate(own):
            place = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={len(own)}", f"--process_id={i}"]
            line = [sys.executable, "-m", "jgpt.train", *arguments, *place, *further]
            started.append(
                subprocess.Popen(line, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        return started

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield begin
    for process in started:
        assert process.stdout is not None
        process.kill()
        process.wait()
        process.stdout.close()


def until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    """Wait for something that running processes do."""
    while not condition():
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.05)


def test_two_processes_train_as_one_with_two_devices(trained: Path, tiny: list[str], tmp_path: Path, command: Command):
    """The same numbers, written once; the checkpoint is of both, and one process reads it."""
    done = subprocess.run(
        [LAUNCHER, "2", "--", *tiny, "--config.execution.parallel=fsdp"],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] finished" in done.stdout and "[1] finished" not in done.stdout
    run = tmp_path / "run"
    assert_close(run, trained, rtol=1e-5)
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(trained)]
    assert status(run)["state"] == "finished"
    listed = (run / "checkpoints" / "4.sha256").read_text()
    assert "ocdbt.process_0" in listed and "ocdbt.process_1" in listed and not verify(run / "checkpoints", 4)
    found = command("evaluate", f"--model={run}", f"--text_glob={tmp_path / 'text.txt'}")
    assert found.code == 0, found.err
    again = command("train", *tiny, "--config.optimizer.total_steps=5")  # by a copy on each device
    assert again.code == 0 and "resuming from step 4" in again.out, again.err


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_saved_and_both_go_on(start: Start, tiny: list[str], tmp_path: Path):
    """Process 1 gets it; the run is saved at a step that both agree on."""
    run = tmp_path / "run"
    processes = start(*tiny, "--config.optimizer.total_steps=100000")
    until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    first, second = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert status(run)["state"] == "stopped" and status(run)["reason"] == "SIGTERM"
    assert not verify(run / "checkpoints", status(run)["step"])


@pytest.mark.slow
def test_two_processes_go_on_from_what_was_uploaded(start: Start, tiny: list[str], tmp_path: Path):
    """The first one copies it into the run directory, and the other waits."""
    run, upload = tmp_path / "run", f"--config.checkpoint.upload=file://{tmp_path}/bucket"
    for steps, said in (4, "step 4/4"), (6, "resuming from step 4 of 6"):
        processes = start(*tiny, upload, f"--config.optimizer.total_steps={steps}")
        first, second = (process.communicate()[0] for process in processes[-2:])
        assert [process.returncode for process in processes[-2:]] == [0, 0] and said in first, first + second
        assert f"checkpoint {steps} was uploaded" in first and "uploaded" not in second
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, code, state, said",
    [
        ({"optimizer.total_steps": 100_000, "deadline_hours": 0.001}, 0, "stopped", "deadline_hours is near"),
        ({"optimizer.total_steps": 9, "optimizer.weight_decay": 1e6}, 4, "failed", "training has diverged"),
    ],
    ids=["the deadline", "divergence"],
)
def test_the_deadline_and_a_divergence_end_both_saved_with_one_code(
    start: Start, own_run: Path, tiny: list[str], changes: dict[str, float], code: int, state: str, said: str
):
    """Each process sees them by itself. The run before was of one process."""
    more = (f"--config.{key}={value}" for key, value in changes.items())
    processes = start(*tiny, "--config.execution.parallel=fsdp", *more)
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], printed
    assert status(own_run)["state"] == state and said in status(own_run)["reason"]
    newest = whole_steps(own_run / "checkpoints")[-1]
    assert not verify(own_run / "checkpoints", newest)
    if code:
        assert newest == 4 and [text.count(said) for text in printed] == [1, 1], printed
        assert all("The newest checkpoint is that of step 4" in text for text in printed)
    else:
        assert newest == status(own_run)["step"] > 4 and printed[0].count(said) == 1 and said not in printed[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_message(
    start: Start, tiny: list[str], tmp_path: Path, victim: int
):
    run = tmp_path / "run"
    processes = start(*tiny, "--config.optimizer.total_steps=100000")
    until(lambda: (run / "checkpoints" / "2.sha256").exists(), processes)
    processes[victim].kill()
    said, _ = processes[1 - victim].communicate(timeout=300)
    if victim == 1 or jax.__version_info__ > (0, 7, 2):  # older ones end their process by themselves, with a page
        assert processes[1 - victim].returncode == 5
        assert f"error: process {victim} of this run (" in said and "the same command" in said
    assert processes[1 - victim].returncode not in (0, None)
    if victim == 1:
        assert status(run)["state"] == "failed" and "process 1" in status(run)["reason"]


@pytest.mark.slow
def test_processes_with_other_configs_are_refused_by_all(start: Start, tiny: list[str]):
    processes = start(*tiny, own=([], ["--config.seed=2"]))
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 2 and "seed: 2 in process 1, 1337 in process 0" in said, said


@pytest.mark.slow
def test_process_0_that_does_not_answer_is_named(tiny: list[str]):
    """Its port is held by a socket that does not listen, so that nobody else can take it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        place = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=1"]
        line = [sys.executable, "-m", "jgpt.train", *tiny, *place, "--coordinator_timeout_seconds=2"]
        done = subprocess.run(line, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 2, done.stderr
    said = f"error: the coordinator of this run, process 0 at {address}, does not answer for 2s (Connection refused)"
    assert said in done.stderr
