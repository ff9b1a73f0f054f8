"""Uploads during a run: they arrive, they never stop or fail it, and a new machine goes on from what arrived."""
# ruff: noqa: F811 (tests name the fixtures that they import)

import io
import json
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
from fake_kaggle import HUB_TOKEN, FakeKaggle, hub, server  # noqa: F401

from jgpt.config import default_config
from jgpt.errors import UserError
from jgpt.kaggle.session import uploads as module
from jgpt.kaggle.session.uploads import Uploads


def test_a_run_goes_on_from_what_was_sent_and_sends_its_last_checkpoint(
    hub, server: FakeKaggle, own_run: Path, tiny, command, checkpoint
):
    with Uploads(checkpoint) as uploads:
        uploads.saved(own_run, 4)
    assert {"config.json", "metrics.jsonl", "status.json", "checkpoint-4.tar", "tokenizer.tar"} <= set(server.hub)
    assert "checkpoint-2.tar" not in server.hub and "tokens.tar" not in server.hub
    with tarfile.open(fileobj=io.BytesIO(server.hub["checkpoint-4.tar"])) as tar:
        assert {"4.sha256", "4/params"} <= set(tar.getnames())
    before = losses(own_run)
    shutil.rmtree(own_run)
    more = (
        "--config.optimizer.total_steps=6",
        "--config.sample.num_samples=0",
        "--config.checkpoint.upload=hub:owner/name",
    )
    again = command("train", *tiny, *more)
    assert again.code == 0 and "resuming from step 4 of 6" in again.out, again.out + again.err
    assert "checkpoint 6 was uploaded to https://huggingface.co/owner/name" in again.out
    assert len(losses(own_run)) == 6 and losses(own_run)[:4] == before
    assert "checkpoint-6.tar" in server.hub
    assert HUB_TOKEN not in again.out + again.err
    assert not list((own_run.parent / "kaggle").rglob("upload-*"))


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()[1:]]


@pytest.fixture
def checkpoint(hub):
    config = default_config().checkpoint
    config.upload, config.upload_every_minutes = "hub:owner/name", 60.0
    return config


def test_a_failed_one_is_tried_again_at_the_next_save_and_a_sent_one_waits(
    checkpoint, server: FakeKaggle, own_run: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "jgpt")
    with Uploads(checkpoint) as uploads:
        server.status = 500
        uploads.saved(own_run, 2)
        uploads._sender.join()
        uploads.saved(own_run, 2)
        uploads._sender.join()
        assert caplog.text.count("checkpoint 2 was not uploaded to hub:owner/name, the next save tries again") == 1
        assert "it answered 500" in caplog.text and HUB_TOKEN not in caplog.text
        server.status = 200
        uploads.saved(own_run, 4)
        shutil.rmtree(own_run / "checkpoints" / "4")  # it was taken aside before `saved` came back
        uploads._sender.join()
        assert "checkpoint 4 was uploaded to" in caplog.text
        sent = len(server.calls)
        uploads.saved(own_run, 4)  # an hour has not passed
    assert "checkpoint-4.tar" in server.hub and len(server.calls) == sent
    assert "the last one" not in caplog.text


def test_an_upload_that_hangs_is_ended(
    checkpoint, own_run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 3600\n")
    python.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(python))
    monkeypatch.setattr(module, "LAST_SECONDS", 0.1)
    with Uploads(checkpoint) as uploads:
        uploads.saved(own_run, 4)  # comes back at once, or this would never end: training goes on
    uploads._sender.join()
    assert uploads._process.returncode == -signal.SIGKILL
    assert "checkpoint 4, the last one, is not at hub:owner/name: it took too long" in caplog.text


def test_what_is_left_is_sent_when_the_run_fails_but_not_when_the_user_leaves_at_once(
    checkpoint, server: FakeKaggle, own_run: Path
):
    checkpoint.upload_every_minutes = 1e9
    with pytest.raises(KeyboardInterrupt), Uploads(checkpoint) as uploads:
        uploads._newest = own_run, 4
        raise KeyboardInterrupt
    assert server.hub == {}
    with pytest.raises(RuntimeError), Uploads(checkpoint) as uploads:
        uploads._newest = own_run, 4
        raise RuntimeError("a bug")
    assert "checkpoint-4.tar" in server.hub and json.loads(server.hub["status.json"])["state"] == "finished"


def test_a_disk_that_is_full_is_told(checkpoint, own_run: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "copy_tree", full)
    with Uploads(checkpoint) as uploads:
        uploads.saved(own_run, 4)
    assert (
        "checkpoint 4 was not uploaded to hub:owner/name, the next save tries again: [Errno 28] No space" in caplog.text
    )


def test_where_nothing_can_be_sent_the_run_does_not_begin(hub, tiny, tmp_path: Path, command):
    result = command("train", *tiny, "--config.checkpoint.upload=somewhere")
    assert result.code == 2 and "'somewhere' is not a place to publish to" in result.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="is not a place"):
        config = default_config().checkpoint
        config.upload = "hub:x"
        Uploads(config)


def test_without_an_address_nothing_happens(own_run: Path):
    with Uploads(default_config().checkpoint) as uploads:
        uploads.saved(own_run, 4)
    assert uploads._newest is None
