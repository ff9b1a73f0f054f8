"""The copies of metrics.jsonl for TensorBoard and Weights & Biases: the same records, once each, and no secret."""

import json
import logging
import math
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from jgpt.config import default_config
from jgpt.training.hooks import wandb_run
from jgpt.training.hooks.trackers import Trackers

TENSORBOARD, WANDB = "--config.logging.tensorboard=true", "--config.logging.wandb=true"
KEY = "0f8e7d6c5b4a39281706f5e4d3c2b1a09f8e7d6c"


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[Any]:
    """Read the one event file of a folder. TFRecord: length and its checksum, data and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents.*")
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        found.append(Event.FromString(data[place + 12 : place + 12 + length]))
        place += length + 16
    return found


def scalars(folder: Path) -> list[dict[str, Any]]:
    """Return the records that the events hold, in their order."""
    found = []
    for event in events(folder):
        if values := {value.tag: value.simple_value for value in event.summary.value if not value.HasField("tensor")}:
            found.append({"step": event.step} | values)
    return found


def wandb_records(path: Path) -> list[Any]:
    """Read an offline run's file: a header, then LevelDB's log of records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found, parts = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records that the only offline run of a run directory holds, without what wandb adds."""
    (path,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    found = []
    for record in wandb_records(path):
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            values = {name: value for name, value in items.items() if not name.startswith("_")}
            found.append({"step": items.get("_step", record.history.step.num)} | values)
    return found


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)  # events hold fp32


def forget_last_checkpoint(run_dir: Path) -> None:
    """Leave a run as one that was killed after it had logged its last step, and before it had saved it."""
    step = records(run_dir)[-1]["step"]
    shutil.rmtree(run_dir / "checkpoints" / str(step))
    (run_dir / "checkpoints" / f"{step}.sha256").unlink()


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody has logged in to Weights & Biases on this machine, and nothing of this machine is changed."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def test_tensorboard_has_each_record_once_also_after_a_kill(tiny: list[str], tmp_path: Path, command: Command) -> None:
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    first = command("train", *tiny, TENSORBOARD, "--config.optimizer.total_steps=3")
    assert first.code == 0, first.err
    assert_same(scalars(run / "tensorboard"), records(run))
    forget_last_checkpoint(run)
    resumed = command("train", *tiny, TENSORBOARD)
    assert "resuming from step 2" in resumed.out
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3, 4]
    assert_same(scalars(run / "tensorboard"), records(run))
    found = events(run / "tensorboard")
    assert found[0].file_version == "brain.Event:2" and found[1].session_log.status == 1  # an open reader starts again
    times = [event.wall_time for event in found[1:]]
    assert times == sorted(times)
    assert b"n_layers" in b"".join(event.SerializeToString() for event in found)  # the config


def test_a_log_that_is_turned_on_later_has_the_earlier_records(
    own_run: Path, tiny: list[str], command: Command
) -> None:
    pytest.importorskip("tensorboardX")
    result = command("train", *tiny, TENSORBOARD, "--config.optimizer.total_steps=5")
    assert result.code == 0, result.err
    assert [record["step"] for record in scalars(own_run / "tensorboard")] == [0, 1, 2, 3, 4, 5]


def trackers(run_dir: Path, name: str) -> Trackers:
    """Return the copy `name` of a run with one record."""
    config = default_config()
    config.logging[name] = True
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    return Trackers(run_dir, config)


def test_what_is_not_finite_is_nan_in_the_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    copy = trackers(tmp_path, "tensorboard")
    copy.write({"step": 1, "loss": None})
    copy.close(failed=True)
    (record,) = scalars(tmp_path / "tensorboard")
    assert math.isnan(record["loss"])


def test_pytorch_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torch.py").write_text("raise SystemExit('loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    copy = trackers(tmp_path, "tensorboard")
    copy.write({"step": 1, "loss": None})
    copy.close(failed=False)
    assert len(scalars(tmp_path / "tensorboard")) == 1 and "torch" not in sys.modules


def test_a_failure_is_one_warning_and_the_run_goes_on(
    tiny: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = pytest.importorskip("tensorboardX.event_file_writer").EventsWriter
    written: list[Any] = []

    def write(self: Any, event: Any) -> None:
        written.append(event)
        if len(written) > 6:
            raise OSError(28, f"No space left on device, hf_{'a1' * 10}")

    monkeypatch.setattr(writer, "write_event", write)
    result = command("train", *tiny, TENSORBOARD)
    assert result.code == 0, result.err
    assert result.out.count("tensorboard: nothing more is logged there, training continues: OSError") == 1
    assert len(written) == 7 and "hf_a1" not in result.out and len(records(tmp_path / "run")) == 5


def test_a_folder_that_cannot_be_written_is_no_error_of_the_run(
    tiny: list[str], tmp_path: Path, command: Command
) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file")
    result = command("train", *tiny, TENSORBOARD)
    assert result.code == 0 and "training continues: FileExistsError" in result.out


def test_a_missing_package_is_an_error_before_the_first_step(
    tiny: list[str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = command("train", *tiny, TENSORBOARD, WANDB)
    assert result.code == 2 and 'pip install "jgpt[tensorboard,wandb]"' in result.err
    assert "pip install tensorboardX wandb" in result.err and not (tmp_path / "run").exists()
    assert command("train", *tiny).code == 0  # nobody asked for them


def test_wandb_is_offline_without_a_key_and_has_each_record_once(
    tiny: list[str], tmp_path: Path, command: Command, no_key: None
) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    first = command("train", *tiny, WANDB, "--config.optimizer.total_steps=3")
    assert first.code == 0, first.err
    assert first.out.count("wandb: offline, as there is no key") == 1
    forget_last_checkpoint(run)
    resumed = command("train", *tiny, WANDB)
    assert resumed.code == 0, resumed.err
    assert_same(history(run), records(run))
    (folder,) = (run / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in resumed.out
    (path,) = folder.glob("run-*.wandb")
    (about,) = [record.run for record in wandb_records(path) if record.HasField("run")][:1]
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in about.config.update}
    assert about.project == "jgpt" and about.display_name == "run" and config["config"]["model"]["n_layers"] == 1


def test_wandb_with_a_key_and_no_internet_is_offline_and_keeps_the_secret(
    tiny: list[str], tmp_path: Path, command: Command, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_" + KEY[::-1], "DB_PASSWORD": "tr0ub4dor&3-" + KEY[5:20]}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    result = command("train", *tiny, WANDB)
    assert result.code == 0, result.err
    assert result.out.count("offline") == 2  # the line that says so names the directory
    assert "wandb: offline, as 127.0.0.1 cannot be reached" in result.out
    assert_same(history(tmp_path / "run"), records(tmp_path / "run"))
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for value in secrets.values():
        assert [path for path in found if value.encode() in path.read_bytes()] == []
        assert value not in result.out + result.err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": KEY}, "offline"),  # the server cannot be reached
        ({"WANDB_MODE": "online"}, "offline"),  # it would ask for a key
    ],
)
def test_the_mode_of_wandb(
    no_key: None, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_run._mode()[0] == expected


def test_a_key_of_wandb_login_counts(no_key: None, tmp_path: Path) -> None:
    assert not wandb_run._has_password("api.wandb.ai")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    assert wandb_run._has_password("api.wandb.ai") and not wandb_run._has_password("example.org")


def test_nothing_is_loaded_where_nothing_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jgpt")
    copy = Trackers(tmp_path, default_config())
    copy.write({"step": 1})
    copy.close(failed=False)
    assert list(tmp_path.iterdir()) == [] and caplog.text == ""
