"""The run directory: one writer, one run, files that are there whole or not at all."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jgpt.atomic_write import write_json
from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.run_dir import identity as module
from jgpt.run_dir.identity import check_same_run, open_run_dir, read_config, write_identity
from jgpt.run_dir.status_file import write_status

REPOSITORY = Path(__file__).parents[2]
HOLD = """
import sys
from jgpt.run_dir.identity import open_run_dir
with open_run_dir(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def config_of(**changes: object) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(changes)
    return config


def test_makes_the_directory_and_its_parents(tmp_path: Path):
    with open_run_dir(str(tmp_path / "a" / "b")) as run_dir:
        assert run_dir == tmp_path / "a" / "b" and run_dir.is_dir()


def test_a_relative_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with open_run_dir("runs/x") as run_dir:
        assert run_dir == tmp_path / "runs" / "x"
    with open_run_dir("~/y") as run_dir:
        assert run_dir == tmp_path / "home" / "y"


def test_refuses_a_second_process_and_lets_go(tmp_path: Path):
    """The lock is the kernel's: it goes with its process, however that ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"\(pid {other.pid}\) is training in .*set another --config.out"):
            with open_run_dir(str(tmp_path)):
                pytest.fail("two processes in one directory")
        other.kill()
        other.wait()
    for _ in range(2):
        with open_run_dir(str(tmp_path)):
            pass


def test_refuses_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("keep me")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written: .*Set --config.out_dir=DIR"):
            with open_run_dir(str(out_dir)):
                pass
    assert (tmp_path / "file").read_text() == "keep me"


def test_refuses_what_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the superuser may write anywhere
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        with open_run_dir(str(tmp_path)):
            pass


def test_same_run_lists_what_may_change(tmp_path: Path):
    write_identity(tmp_path, config_of())
    assert check_same_run(tmp_path, config_of()) == []
    changes = {
        "model.dropout": 0.2,
        "optimizer.learning_rate": 5e-4,
        "execution.micro_batch_size": 8,
        "execution.remat": "block",
    }
    changes |= {"out_dir": "elsewhere", "optimizer.total_steps": 2000, "data.text_glob": "*.txt"}
    found = check_same_run(tmp_path, config_of(**changes))
    assert [line.split(":")[0] for line in found] == sorted(key for key in changes if key != "out_dir")
    assert "model.dropout: 0.0 -> 0.2" in found and "execution.remat: 'none' -> 'block'" in found


@pytest.mark.parametrize(
    "changes",
    [
        {"model.n_layers": 7},
        {"model.tie_embeddings": False, "model.vocab_size": 5000, "optimizer.total_steps": 5},
        {"tokenizer.kind": "char"},
        {"tokenizer.vocab_size": 300, "model.d_ff": 64},
        {"precision.params": "fp16"},
    ],
    ids=str,
)
def test_another_model_or_tokenizer_is_refused_with_the_list(tmp_path: Path, changes: dict[str, object]):
    write_identity(tmp_path, config_of())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds a run with another model, tokenizer or optimizer") as error:
        check_same_run(tmp_path, config_of(**changes))
    listed = [line.strip().split(":")[0] for line in str(error.value).splitlines()[1:-1]]
    assert listed == sorted(key for key in changes if not key.startswith("optimizer."))
    assert "nothing there was changed" in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_key_that_is_newer_than_the_run_counts_with_its_default(tmp_path: Path):
    write_identity(tmp_path, config_of())
    old = json.loads((tmp_path / "config.json").read_text())
    old["seed"] = 7
    del old["log_every_steps"], old["model"]["qk_norm"]
    write_json(tmp_path / "config.json", old)
    assert check_same_run(tmp_path, config_of(log_every_steps=3)) == ["log_every_steps: 10 -> 3", "seed: 7 -> 1337"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"forgotten": 1}', '{"seed": "x"}', '{"model": {"width": 2}}'])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    for read in (lambda: read_config(tmp_path), lambda: check_same_run(tmp_path, config_of())):
        with pytest.raises(UserError, match="config.json is damaged, or of another version of jgpt: .*nothing was"):
            read()


def test_config_comes_back_with_defaults_for_what_is_newer(tmp_path: Path):
    config = config_of(**{"model.n_layers": 3, "optimizer.learning_rate": 3e-4, "data.text_glob": "ä/**/*.txt"})
    write_identity(tmp_path, config)
    assert read_config(tmp_path).to_dict() == config.to_dict()
    old = json.loads((tmp_path / "config.json").read_text())
    del old["sample"], old["model"]["qk_norm"]
    write_json(tmp_path / "config.json", old)
    assert read_config(tmp_path).to_dict() == config.to_dict()


def test_versions_name_what_made_the_run(tmp_path: Path):
    write_identity(tmp_path, config_of())
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"python", "machine", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "devices"} <= set(versions)
    assert versions["devices"].startswith("2 x ")


def test_status_says_how_the_run_stands(tmp_path: Path):
    write_status(tmp_path, "stopped", 40, 100, "SIGTERM", "python -m jgpt.train --config x.py")
    status = json.loads((tmp_path / "status.json").read_text())
    assert {key: status[key] for key in ("state", "step", "total_steps", "reason", "resume_command")} == {
        "state": "stopped", "step": 40, "total_steps": 100, "reason": "SIGTERM",
        "resume_command": "python -m jgpt.train --config x.py",
    }  # fmt: skip


def test_status_is_whole_at_every_moment(tmp_path: Path):
    """A reader beside the writer never sees half a file, and nothing else is left behind."""
    stop, bad = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads((tmp_path / "status.json").read_text())
            except ValueError as error:
                bad.append(error)

    write_status(tmp_path, "running", 0, 9, "", "x" * 5000)
    reader = threading.Thread(target=read)
    reader.start()
    for step in range(60):
        write_status(tmp_path, "running", step, 9, "", "x" * (5000 - 50 * step))
    stop.set()
    reader.join()
    assert not bad and [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        module.write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
