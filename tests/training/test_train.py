"""The command that trains: what it leaves behind, and that no bad input costs anything."""

import fcntl
import html
import json
import shlex
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import TEXT

from jgpt.hardware import devices
from jgpt.training import start


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(result, *parts: str) -> None:
    """Assert that the command ended with one error message that holds `parts`."""
    assert result.code == 2, result.err
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


def test_a_run_directory_holds_all_that_is_promised(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "versions.json", "tokenizer", "checkpoints", "metrics.jsonl", "samples.txt"}
    assert names >= {"loss.png", "report.html", "status.json"}
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 2, 4]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    status = json.loads((trained / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 4, 4)
    assert status["resume_command"].startswith("python -m jgpt.train --config=")
    assert sorted(path.name for path in (trained / "checkpoints").glob("*.sha256")) == ["2.sha256", "4.sha256"]
    assert "sample" in (trained / "samples.txt").read_text()


def test_the_command_to_try_a_model_has_words_that_it_knows(trained, parrot):
    tried = shlex.split(json.loads((trained / "status.json").read_text())["try_command"])
    assert tried[:-1] == ["python", "-m", "jgpt.generate", "--model", str(trained), "--prompt"]
    assert len(tried[-1]) > 10 and tried[-1] in TEXT
    assert tried[-1] in html.unescape((trained / "report.html").read_text())
    chat = json.loads((parrot / "status.json").read_text())["try_command"]
    assert chat == f"python -m jgpt.chat --model {parrot}"
    assert chat in (parrot / "report.html").read_text()


def test_the_end_of_training_names_the_report_and_the_next_command(command, tiny, tmp_path):
    result = command("train", *tiny, "--config.sample.prompt=7 times")
    assert result.code == 0 and f"The whole run on one page: {tmp_path / 'run' / 'report.html'}" in result.out
    assert f"To try the model:\n  python -m jgpt.generate --model {tmp_path / 'run'} --prompt '7 times'\n" in result.out


def test_a_finished_run_says_so_and_does_not_train(command, own_run, tiny):
    before = (own_run / "metrics.jsonl").read_text()
    result = command("train", *tiny)
    assert result.code == 0 and result.err == ""
    assert "this run is done: step 4 of 4. To go on, raise --config.optimizer.total_steps" in result.out
    assert (own_run / "metrics.jsonl").read_text() == before


def test_the_resume_command_never_asks_to_start_anew(command, own_run, tiny):
    assert command("train", *tiny, "--config.checkpoint.resume=must").code == 0
    assert "resume=" not in json.loads((own_run / "status.json").read_text())["resume_command"]


def test_no_file_matches(command, tiny, tmp_path):
    refused(command("train", *tiny, f"--config.data.text_glob={tmp_path}/*.md"), f"{tmp_path}/*.md", "matches no file")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["model.context_length=16 is longer than the data: 0 bytes", "give more text"]),
        ("sixteen letters.", ["model.context_length=16 is longer than the data: 16 bytes"]),
        ("short " * 4, ["model.context_length is 16, and the training text has 23 tokens", "At least 32", "more text"]),
        ("longer " * 9, ["model.context_length is 16, and the validation text has 6 tokens", "data.val_fraction"]),
    ],
)
def test_an_empty_or_too_short_corpus(command, tiny, tmp_path, text, parts):
    (tmp_path / "text.txt").write_text(text)
    refused(command("train", *tiny), *parts)
    assert not (tmp_path / "run" / "config.json").exists()


def test_text_that_is_not_utf8(command, tiny, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"good text, then \xff")
    with (tmp_path / "text.txt").open("ab") as file:
        file.write(b" and more" * 100)
    refused(
        command("train", *tiny),
        f"{tmp_path / 'text.txt'} is not UTF-8: byte 0xff at byte offset 16",
        "set data.encoding_errors='replace'",
    )


def test_all_problems_of_a_config_in_one_message(command, tiny, tmp_path):
    result = command("train", *tiny, "--config.model.n_heads=3", "--config.execution.micro_batch_size=3")
    refused(
        result,
        "the config has these 2 problems:",
        "model.n_heads=3 does not divide model.d_model=16",
        "execution.micro_batch_size=3 does not divide batch.global_batch_size=4",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "/run"])
def test_out_dir_cannot_be_written(command, tiny, tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    refused(command("train", *tiny, f"--config.out_dir={tmp_path}/taken{below}"), "taken", "--config.out_dir=DIR")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.model.n_layers=2"], ["model.n_layers: 1 -> 2"]),
        (["--config.tokenizer.kind=bpe"], ["tokenizer.kind: 'char' -> 'bpe'"]),
        (
            ["--config.model.d_model=32", "--config.model.bias"],
            ["model.d_model: 16 -> 32", "model.bias: False -> True"],
        ),
        (["--config.optimizer.kind=muon"], ["optimizer.kind: 'adamw' -> 'muon'"]),
        (["--config.checkpoint.resume=never"], ["checkpoint.resume='never'", "holds a run"]),
    ],
    ids=repr,
)
def test_a_directory_with_another_run_is_left_alone(command, own_run, tiny, arguments, parts):
    before = snapshot(own_run)
    refused(command("train", *tiny, *arguments), str(own_run), "--config.out_dir", *parts)
    assert snapshot(own_run) == before


def test_there_must_be_a_run_to_resume(command, tiny, tmp_path):
    refused(command("train", *tiny, "--config.checkpoint.resume=must"), "checkpoint.resume='must'", "holds no run")


def test_a_run_that_was_lost_before_its_first_checkpoint_may_save_more_often(command, own_run, tiny, monkeypatch):
    """Also where the next start is interrupted: the old steps are not taken for those of a run that saved so often."""
    shutil.rmtree(own_run / "checkpoints")
    often = "--config.checkpoint.every_steps=1"
    with monkeypatch.context() as patch:
        patch.setattr(start, "begin", interrupt)
        assert command("train", *tiny, often).code == 130
    result = command("train", *tiny, often)
    assert result.code == 0, result.err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_processes_cannot_write_in_one_run(command, own_run, tiny):
    with (own_run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(command("train", *tiny), "another process is training in", "--config.out_dir")


def test_a_disk_too_small_for_the_checkpoints(command, tiny, tmp_path, monkeypatch):
    free = namedtuple("usage", "total used free")(10**6, 999_000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(
        command("train", *tiny),
        "the disk is too small for the checkpoints planned: 4 of 0.00 GB (keep_last=2, keep_best=True",
        "--config.checkpoint.keep_last=1",
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        tokens = np.fromfile(path, np.uint16)
        tokens[len(tokens) // 2] = 60_000
        tokens.tofile(path)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("how", "parts"),
    [("truncated", ["bytes, and", "are expected"]), ("past", ["it is not what was written"])],
)
def test_damaged_token_files(command, tiny, tmp_path, split, how, parts):
    assert command("prepare", *tiny).code == 0
    path = tmp_path / "run" / "tokens" / f"{split}_00000.bin"
    damage(path, how)
    before = snapshot(tmp_path)
    refused(command("train", *tiny), f"{path} is damaged", "delete", *parts)
    (tmp_path / "run" / ".lock").unlink()
    assert snapshot(tmp_path) == before


def test_a_vocabulary_smaller_than_the_tokenizers(command, tiny, tmp_path):
    refused(
        command("train", *tiny, "--config.model.vocab_size=10"),
        "model.vocab_size=10, and the tokenizer has",
        "--config.model.vocab_size=0",
    )
    assert not (tmp_path / "run" / "config.json").exists()


def test_bf16_on_a_t4(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "compute_capability", lambda device: (7, 5))
    result = command("train", *tiny, "--config.precision.compute=bf16")
    refused(result, "precision.compute='bf16' on a GPU of compute capability 7.5", "--config.precision.compute=auto")
    assert not (tmp_path / "run" / "config.json").exists()


def test_tensorflow_in_the_process(command, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    refused(command("train", *tiny), "TensorFlow is imported in this process", "python -m jgpt.train")
    assert not (tmp_path / "run").exists()
