"""Whole sessions in folders that imitate Kaggle: killed, resumed from its output, and the same run to the last bit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from fake_machine import NAME, OWNER, Machine, metrics_of, settings

from jgpt.kaggle.laptop.kernel import Kernel, read_folder, write_folder

REPOSITORY = Path(__file__).parents[2]
CONFIG = str(REPOSITORY / "configs" / "kaggle_t4.py")
# A config whose run is killed, as by a machine that is out of memory, when its first checkpoint is whole.
# The next save waits for that call, so there is no second one, however fast the machine is.
KILLED = f"""
import os, runpy, signal
from jgpt.kaggle.session.uploads import Uploads
Uploads.saved = lambda self, run_dir, step: os.kill(os.getpid(), signal.SIGKILL)
get_config = runpy.run_path({CONFIG!r})["get_config"]
"""


@pytest.fixture
def machine(tmp_path, python_without_ml_collections, compiled_on_kaggle):
    return lambda name: Machine(tmp_path / name, python_without_ml_collections, compiled_on_kaggle)


def kernel(config: str = CONFIG, **changes) -> Kernel:
    arguments = ("--config", config, *settings(**changes))
    return Kernel(f"{OWNER}/{NAME}", arguments=arguments, config=config, datasets=(f"{OWNER}/texts",))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_run_that_was_never_killed(tmp_path, machine, command):
    first = machine("first")
    (tmp_path / "killed.py").write_text(KILLED)
    output = first.run(write_folder(kernel(str(tmp_path / "killed.py")), tmp_path / "folder"))
    status = first.status()
    assert status["state"] == "failed" and status["total_steps"] == 6, output
    assert status["reason"].startswith(f"killed by signal {signal.SIGKILL:d} (SIGKILL)\n")
    names = {path.name for path in first.outputs.iterdir() if not path.name.startswith(".")}
    assert all((first.outputs / name).is_file() for name in names)  # no folder is left for a dataset to drop
    assert {"config.json", "metrics.jsonl", "status.json", "tokenizer.tar", "checkpoint-3.tar"} <= names

    second = machine("second")
    place = second.mount(first.root / "working")
    before = listing(second.root / "input")
    resumed = replace(read_folder(tmp_path / "folder"), kernels=(f"{OWNER}/{NAME}",), config=CONFIG)
    resumed = replace(resumed, arguments=kernel().arguments)
    output = second.run(write_folder(resumed, tmp_path / "folder"))
    assert f"continuing from checkpoint 3 of {place}/outputs" in output
    assert "resuming from step 3 of 6" in output and "the text has changed" not in output
    assert (second.status()["state"], second.status()["step"]) == ("finished", 6)
    assert {"checkpoint-6.tar", "report.html"} <= {path.name for path in second.outputs.iterdir()}
    assert listing(second.root / "input") == before

    folders = {"out_dir": tmp_path / "run", "data.cache_dir": tmp_path / "tokens", "data.text_glob": second.text}
    whole = command("train", *kernel().arguments, *(f"--config.{key}={value}" for key, value in folders.items()))
    assert whole.code == 0, whole.err
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(7))
    assert metrics_of(second.outputs) == metrics_of(tmp_path / "run")


def test_without_what_it_was_pushed_with_it_does_not_start_from_scratch(tmp_path, tiny, command, monkeypatch):
    (tmp_path / "kaggle" / "input" / "datasets" / OWNER / "texts").mkdir(parents=True)
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("JGPT_KAGGLE_INPUTS", f"datasets {OWNER}/texts,notebooks {OWNER}/{NAME}")
    result = command("train", *tiny)
    assert result.code == 2 and f"notebooks '{OWNER}/{NAME}' is not mounted" in result.err
    assert f"{os.sep}datasets{os.sep}{OWNER}{os.sep}texts" in result.err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mounted_tokenizer_works_offline(tmp_path, machine, trained):
    session = machine("session")
    mounted = session.root / "input" / "datasets" / OWNER / "tokenizer"
    mounted.mkdir()
    for path in (trained / "tokenizer").iterdir():
        (mounted / path.name).write_bytes(path.read_bytes())
    prepare = replace(kernel(tokenizer__kind="hf", tokenizer__pretrained=mounted), module="jgpt.prepare")
    output = session.run(write_folder(prepare, tmp_path / "folder"))
    assert session.status()["state"] == "finished", output
    (found,) = (session.root / "temp" / "jgpt" / "tokens").rglob("tokenizer.json")
    assert json.loads(found.read_text())["model"]["type"] == "BPE"
