"""Runs that start from another: they begin at its loss, stop and go on, and know it again."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import FROM_A_MODEL, LORA
from runs import assert_close, assert_same_run, metrics, status, stop_after

from jgpt.run_dir.manifest import digest

Tune = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Training sets variables for the libraries below it: they are put back."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def tune(command: Any, tiny: list[str]) -> Tune:
    """Train in `tmp_path`/run, starting from a model."""
    return lambda base, *more: command("train", *tiny, *FROM_A_MODEL, f"--config.init_from={base}", *more)


def test_a_full_fine_tune_begins_at_the_source_and_does_not_need_it_again(trained: Path, tune: Tune, tmp_path: Path):
    base, run = shutil.copytree(trained, tmp_path / "base"), tmp_path / "run"
    with stop_after(3):
        assert tune(base).code == 0
    assert metrics(run)[0]["val_loss"] == metrics(trained)[-1]["val_loss"] and status(run)["step"] == 3
    shutil.rmtree(base)
    result = tune(base)
    assert result.code == 0 and "resuming from step 3" in result.out, result.err
    assert [line["step"] for line in metrics(run)] == list(range(5))
    refused = tune("", "--config.tokenizer.kind=hf", f"--config.tokenizer.pretrained={run}")
    assert refused.code == 2 and "init_from: " in refused.err and "base' -> ''" in refused.err, refused.err


def test_lora_stopped_and_started_again(adapted: Path, trained: Path, tune: Tune, tmp_path: Path):
    """Bit for bit, its base unchanged, also where that has moved; another base is refused."""
    base, run = shutil.copytree(trained, tmp_path / "base"), tmp_path / "run"
    before = digest(base)
    with stop_after(3):
        assert tune(base, *LORA).code == 0
    moved = base.rename(tmp_path / "moved")
    assert tune(moved, *LORA).code == 0
    assert_same_run(adapted / "run", run)
    lines = metrics(run)
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert digest(moved).replace("moved/", "base/") == before
    refused = tune(moved, *LORA, "--config.lora.rank=4")
    assert refused.code == 2 and "lora.rank: 2 -> 4" in refused.err, refused.err
    (moved / "checkpoints" / "4.sha256").unlink()  # the one before is another model
    refused = tune(moved, *LORA)
    assert refused.code == 2 and "holds another model than the one that this run began from" in refused.err


def test_lora_on_a_base_that_both_devices_share(adapted: Path, tune: Tune, tmp_path: Path):
    """The same run as with a copy on each, and its checkpoint goes on there."""
    with stop_after(3):
        assert tune(adapted / "base", *LORA, "--config.execution.parallel=tensor").code == 0
    assert_close(adapted / "run", tmp_path / "run", rtol=1e-4, steps=4)
    assert tune(adapted / "base", *LORA).code == 0
    assert status(tmp_path / "run")["state"] == "finished"
    assert_close(adapted / "run", tmp_path / "run", rtol=1e-3)
