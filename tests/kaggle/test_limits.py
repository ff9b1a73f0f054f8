"""A run fits its config to Kaggle's machine: the deadline, the disk, and nothing at all elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jgpt.config import default_config
from jgpt.kaggle.session import limits
from jgpt.kaggle.session.limits import fit_to_kaggle, session_hours


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("working", "input", "temp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(limits, "session_hours", lambda: 0.25)
    return tmp_path


def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    config = default_config()
    assert fit_to_kaggle(config) is config and config.deadline_hours == 0


def test_the_deadline_is_eleven_hours_less_the_sessions_age(kaggle: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jgpt")
    given = default_config()
    config = fit_to_kaggle(given)
    assert config.deadline_hours == 10.75 and config.is_locked and given.deadline_hours == 0
    assert "deadline_hours=10.75: Kaggle kills a session after 12 hours, this one is 0.25 hours old" in caplog.text
    given.deadline_hours = 2.0  # what the user asks for stays
    assert fit_to_kaggle(given).deadline_hours == 2


def test_a_run_that_leaves_its_steps_open_gets_the_sessions_hours(kaggle: Path):
    config = default_config()
    assert fit_to_kaggle(config).optimizer.budget_hours == 0
    config.optimizer.total_steps = 0
    assert fit_to_kaggle(config).optimizer.budget_hours == 10.75
    config.optimizer.budget_hours = 40.0  # of several sessions, as a chain gives them
    fitted = fit_to_kaggle(config)
    assert (fitted.optimizer.budget_hours, fitted.deadline_hours) == (40.0, 10.75)


def test_a_session_that_seems_too_old_still_trains(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "session_hours", lambda: 100.0)
    assert fit_to_kaggle(default_config()).deadline_hours == limits.LEAST_HOURS


def test_the_disk_is_what_is_kept_less_what_else_lies_there(kaggle: Path):
    config = default_config()
    config.out_dir = str(kaggle / "working" / "outputs")
    fitted = fit_to_kaggle(config)
    assert fitted.checkpoint.disk_gb == 19.5
    assert fitted.data.cache_dir == str(kaggle / "temp" / "jgpt" / "tokens" / "outputs")
    (kaggle / "working" / "outputs").mkdir()
    for name, size in (("outputs/ours", 3_000_000_000), ("theirs", 1_500_000_000)):
        with (kaggle / "working" / name).open("wb") as file:
            file.truncate(size)  # sparse: takes nothing here
    config.data.cache_dir = "/mine"
    fitted = fit_to_kaggle(config)
    assert fitted.checkpoint.disk_gb == 18.0 and fitted.data.cache_dir == "/mine"
    config.checkpoint.disk_gb = 10.0
    assert fit_to_kaggle(config).checkpoint.disk_gb == 8.5
    config.checkpoint.disk_gb = 1.0
    assert 0 < fit_to_kaggle(config).checkpoint.disk_gb < 0.1  # and not 0, which would be no budget
    config.out_dir = str(kaggle / "temp" / "outputs")
    assert fit_to_kaggle(config).checkpoint.disk_gb == 1.0  # scratch has no such limit


def test_the_session_is_as_old_as_its_oldest_process():
    """A parent that Kaggle started a tenth of a second before its child, below one that Kaggle did not start."""
    child = "from jgpt.kaggle.session.limits import _start_times; t = list(_start_times()); print(t[0] - min(t))"
    parent = f"import subprocess, sys, time; time.sleep(0.1); subprocess.run([sys.executable, '-c', {child!r}])"
    environment = {k: v for k, v in os.environ.items() if k != "KAGGLE_KERNEL_RUN_TYPE"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    older = []  # seconds that the oldest process of the session is older than the child
    for more in ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, {}):
        done = subprocess.run([sys.executable, "-c", parent], env=environment | more, capture_output=True, text=True)
        older.append(float(done.stdout))
    assert older[0] >= 0.05 and older[1] == 0
    assert session_hours() * 3600 > 0
