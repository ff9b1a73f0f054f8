"""The notebooks, cell by cell, in folders that imitate Kaggle, with small models; no output is kept in their files."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_machine import Machine, settings

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
Execute = Callable[..., str]


@pytest.fixture
def execute(tmp_path: Path, compiled_on_kaggle: Path) -> Execute:
    """Run a notebook on a machine, with `code` behind its settings, and return what its cells printed."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

    def run(machine: Machine, name: str, code: str) -> str:
        (machine.root / "code").symlink_to(REPOSITORY)
        text = (REPOSITORY / "notebooks" / name).read_text(encoding="utf-8")
        text = text.replace("/kaggle/", f"{machine.root}/").replace("/tmp/jgpt-code", f"{machine.root}/code")
        notebook = nbformat.reads(text, as_version=4)
        (found,) = (n for n, cell in enumerate(notebook.cells) if "settings" in cell.metadata.get("tags", []))
        notebook.cells.insert(found + 1, nbformat.v4.new_code_cell(code))
        environment = machine.environment() | {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={})
        client.execute(cwd=str(machine.root / "working"), env=environment)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not any(output.get("name") == "stderr" and "Traceback" in output["text"] for output in outputs)
        return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)

    return run


def small(**changes: Any) -> dict[str, Any]:
    """Return the changes of a run that takes a second, as Python's values."""
    pairs = (line.removeprefix("--config.").split("=", 1) for line in settings(**changes))
    values = {"True": True, "False": False}
    return {key: values.get(value, _number(value)) for key, value in pairs}


def _number(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def session(tmp_path: Path, name: str, compiled: Path) -> Machine:
    return Machine(tmp_path / name, Path(sys.executable), compiled)


@pytest.mark.slow
def test_two_sessions_of_kaggle_t4(execute: Execute, tmp_path: Path, compiled_on_kaggle: Path):
    first = session(tmp_path, "first", compiled_on_kaggle)
    output = execute(
        first, "kaggle_t4.ipynb", f"changes.update({small(optimizer__total_steps=3, optimizer__warmup_steps=1)!r})"
    )
    assert "1 files, 0.0 MB" in output and "Training can work here" in output
    assert "devices 2" in output and "finished" in output and "-" * 80 in output
    assert first.status()["state"] == "finished" and first.status()["step"] == 3
    second = session(tmp_path, "second", compiled_on_kaggle)
    place = second.mount(first.root / "working")
    output = execute(second, "kaggle_t4.ipynb", f"changes.update({small(optimizer__total_steps=6)!r})")
    assert f"continuing from checkpoint 3 of {place}/outputs" in output and "the text has changed" not in output
    assert second.status()["state"] == "finished" and second.status()["step"] == 6


@pytest.mark.slow
def test_finetune_chat(execute: Execute, tmp_path: Path, compiled_on_kaggle: Path, parrot: Path):
    machine = session(tmp_path, "one", compiled_on_kaggle)
    changes = {"optimizer.total_steps": 2, "optimizer.warmup_steps": 1, "lora.rank": 2, "batch.sequence_length": 64,
               "batch.global_batch_size": 4, "execution.micro_batch_size": 2, "sample.num_samples": 0,
               "eval.batches": 1}  # fmt: skip
    output = execute(machine, "finetune_chat.ipynb", f"BASE = {str(parrot)!r}\nchanges.update({changes!r})")
    assert "Ahoy! What is rain, ye ask?" in output and "What is a river? ->" in output
    exported = machine.root / "working" / "pirate-model"
    assert {"config.json", "model.safetensors"} <= {path.name for path in exported.iterdir()}
    assert "model.safetensors" in output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_nothing_of_a_run_is_kept(path: Path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert {"kaggle_t4.ipynb", "finetune_chat.ipynb"} == {path.name for path in NOTEBOOKS}
    assert not any(name in path.read_text(encoding="utf-8") for name in (os.environ.get("HOME", "/x") + "/",))
