"""Runs in a bucket, here on the disk (file://) or in memory: what is sent comes back, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Command
from fsspec.implementations.memory import MemoryFileSystem

from jgpt.errors import UserError
from jgpt.kaggle.session import bucket
from jgpt.kaggle.session.publish import check_target, fetch, publish


def losses(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_same_command_goes_on_elsewhere_from_what_was_sent(
    own_run: Path, tiny: list[str], tmp_path: Path, command: Command
):
    there = tmp_path / "bucket" / "mine"
    more = ["--config.sample.num_samples=0", f"--config.checkpoint.upload=file://{there}"]
    sent = command("train", *tiny, *more, "--config.optimizer.total_steps=6")
    assert sent.code == 0 and f"checkpoint 6 was uploaded to file://{there}" in sent.out, sent.out + sent.err
    assert {"config.json", "metrics.jsonl", "status.json", "tokenizer.tar", "checkpoint-6.tar"} <= names(there)
    assert "checkpoint-4.tar" not in names(there) and not [name for name in names(there) if name.startswith(".")]
    before = losses(own_run)
    shutil.copytree(own_run, tmp_path / "at 6")
    shutil.rmtree(own_run)
    again = command("train", *tiny, *more, "--config.optimizer.total_steps=8")
    assert again.code == 0 and "resuming from step 6 of 8" in again.out, again.out + again.err
    assert f"continuing from checkpoint 6 of file://{there}" in again.out
    assert losses(own_run).items() > before.items() and "checkpoint-8.tar" in names(there)

    # The machine that was left at step 6 does not go back to it: the bucket is newer.
    eight = losses(own_run)
    shutil.rmtree(own_run)
    shutil.move(tmp_path / "at 6", own_run)
    again = command("train", *tiny, *more, "--config.optimizer.total_steps=8")
    assert again.code == 0 and losses(own_run) == eight, again.out + again.err


def test_another_run_there_is_not_replaced(own_run: Path, tiny: list[str], tmp_path: Path, command: Command):
    there = tmp_path / "bucket"
    publish(own_run, f"file://{there}")
    before = {path: path.read_bytes() for path in there.iterdir()}
    upload = f"--config.checkpoint.upload=file://{there}"
    for other, said in {
        "--config.model.d_model=32": "model.d_model: 16 -> 32",
        "--config.checkpoint.resume=never": "checkpoint.resume='never'",
    }.items():
        result = command("train", *tiny, upload, other, f"--config.out_dir={tmp_path / 'other'}")
        assert result.code == 2 and said in result.err, result.err
        assert "holds another run, which uploads of this one would replace:\n  " in result.err
        assert f"--config.checkpoint.upload=file://{there}-2" in result.err
        assert not (tmp_path / "other").exists()
    assert {path: path.read_bytes() for path in there.iterdir()} == before


def test_an_export_arrives_with_its_folders(memory: MemoryFileSystem, tmp_path: Path):
    (tmp_path / "export" / "sub").mkdir(parents=True)
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export" / "sub" / "table").write_bytes(b"weights")
    assert publish(tmp_path / "export", "memory://bucket/model/") == "memory://bucket/model"
    assert memory.cat("/bucket/model/sub/table") == b"weights"
    assert fetch("memory://bucket/model", tmp_path / "back") == tmp_path / "back"
    assert names(tmp_path / "back") == {"config.json"}
    assert fetch("memory://bucket/nothing", tmp_path / "none") is None and bucket.newest_step("memory://bucket") == -1


def test_an_upload_that_ends_half_way_leaves_the_earlier_checkpoint(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for step in (9, 10):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / f"checkpoint-{step}.tar").write_text("weights")
        (tmp_path / str(step) / "metrics.jsonl").write_text(str(step))
    bucket.send(tmp_path / "9", "memory://bucket/run")
    put = memory.put_file

    def breaks(local: str, remote: str) -> None:
        if remote.endswith(".tar"):
            raise ConnectionError("gone")
        put(local, remote)

    monkeypatch.setattr(MemoryFileSystem, "put_file", staticmethod(breaks))
    with pytest.raises(ConnectionError):
        bucket.send(tmp_path / "10", "memory://bucket/run")
    assert bucket.newest_step("memory://bucket/run") == 9
    monkeypatch.undo()
    bucket.send(tmp_path / "10", "memory://bucket/run")
    assert bucket.newest_step("memory://bucket/run") == 10 and not memory.exists("/bucket/run/checkpoint-9.tar")


@pytest.mark.parametrize(
    "address, said",
    [
        ("file:///proc/nothing/here", "'file:///proc/nothing/here' cannot be written to: .*The bucket must exist"),
        ("nonsense://bucket/run", "'nonsense://bucket/run' cannot be opened: ValueError: Protocol not known: nonsense"),
        ("adl://bucket/run", "'adl://bucket/run' needs a package: .*Install it with pip"),
    ],
)
def test_what_cannot_be_sent_is_told_before_the_run_begins(address: str, said: str):
    with pytest.raises(UserError, match=said):
        check_target(address)


def test_a_bucket_that_cannot_be_read_does_not_begin_the_run_again(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory.pipe_file("/bucket/run/config.json", b"{}")

    def fails(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden: storage.objects.get")

    monkeypatch.setattr(MemoryFileSystem, "ls", fails)
    with pytest.raises(UserError, match="'/bucket/run' cannot be listed: PermissionError: Forbidden: storage.objects"):
        bucket.newest_step("memory://bucket/run")
    monkeypatch.undo()
    monkeypatch.setattr(MemoryFileSystem, "get_file", fails)
    with pytest.raises(UserError, match="cannot be read: PermissionError: Forbidden: storage.objects.get. Nothing was"):
        fetch("memory://bucket/run", tmp_path / "back")
