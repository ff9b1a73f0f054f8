"""The whole round trip in folders that imitate Kaggle: stopped by its deadline, resumed from its output, never lost."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import NAME, OWNER, Machine, settings

from jgpt.kaggle.laptop.kernel import Kernel, read_folder, write_folder

REPOSITORY = Path(__file__).parents[2]
CONFIG = str(REPOSITORY / "configs" / "kaggle_t4.py")

pytestmark = pytest.mark.slow


@pytest.fixture
def machine(tmp_path, python_without_ml_collections, compiled_on_kaggle):
    return lambda name: Machine(tmp_path / name, python_without_ml_collections, compiled_on_kaggle)


def kernel(**changes) -> Kernel:
    arguments = ("--config", CONFIG, *settings(**changes))
    return Kernel(f"{OWNER}/{NAME}", arguments=arguments, config=CONFIG, datasets=(f"{OWNER}/texts",))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def test_stopped_by_its_deadline_and_resumed_it_is_the_run_that_was_never_stopped(tmp_path, machine):
    first = machine("first")
    script = write_folder(kernel(deadline_hours=0.001), tmp_path / "folder")
    output = first.run(script)
    stopped = first.status()
    assert stopped["state"] == "stopped" and 0 < stopped["step"] < 60, output
    assert "deadline" in stopped["reason"]
    names = {path.name for path in first.outputs.iterdir() if not path.name.startswith(".")}
    assert all((first.outputs / name).is_file() for name in names)  # no folder is left for a dataset to drop
    assert {"config.json", "metrics.jsonl", "status.json", "tokenizer.tar", "report.html"} <= names
    assert f"checkpoint-{stopped['step']}.tar" in names

    second = machine("second")
    place = second.mount(first.root / "working")
    before = listing(second.root / "input")
    arguments = (*kernel().arguments, "--config.deadline_hours=0")
    resumed = replace(read_folder(tmp_path / "folder"), kernels=(f"{OWNER}/{NAME}",), arguments=arguments)
    output = second.run(write_folder(resumed, tmp_path / "folder"))
    assert f"continuing from checkpoint {stopped['step']} of {place}/outputs" in output
    assert f"resuming from step {stopped['step']} of 60" in output
    assert "the text has changed" not in output
    assert (second.status()["state"], second.status()["step"]) == ("finished", 60)
    assert listing(second.root / "input") == before

    whole = machine("whole")
    whole.run(write_folder(kernel(), tmp_path / "whole-folder"))
    assert [line["step"] for line in whole.metrics()] == list(range(61))
    assert second.metrics() == whole.metrics()


def test_without_what_it_was_pushed_with_it_does_not_begin_anew(tmp_path, machine):
    session = machine("session")
    output = session.run(write_folder(replace(kernel(), kernels=(f"{OWNER}/{NAME}",)), tmp_path / "folder"))
    status = session.status()
    assert status["state"] == "failed" and status["reason"].startswith("exit code 2\n")
    assert f"notebooks '{OWNER}/{NAME}' is not mounted" in status["reason"] and "Traceback" not in output
    assert str(session.root / "input" / "datasets" / OWNER / "texts") in status["reason"]


@pytest.mark.parametrize("kind", ["bpe", "hf"])
def test_every_tokenizer_works_offline(tmp_path, machine, trained, kind):
    session = machine("session")
    mounted = session.root / "input" / "datasets" / OWNER / "tokenizer"
    changes = {"tokenizer__kind": kind, "optimizer__total_steps": 3, "sample__num_samples": 0}
    if kind == "hf":
        mounted.mkdir()
        for path in (trained / "tokenizer").iterdir():
            (mounted / path.name).write_bytes(path.read_bytes())
        changes["tokenizer__pretrained"] = str(mounted)
    else:
        changes["tokenizer__vocab_size"] = 300
    output = session.run(write_folder(kernel(**changes), tmp_path / "folder"))
    assert session.status()["state"] == "finished", output
    with tarfile.open(session.outputs / "tokenizer.tar") as tar:
        found = json.load(tar.extractfile("tokenizer/tokenizer.json"))
    assert found["model"]["type"] == "BPE"
