"""The command that measures a model: the run's own number, and that of any other text."""

import math
import re
import shutil

import jax
import pytest
from conftest import TEXT

from jgpt.data.blocks import blocks
from jgpt.data.token_files import open_token_data
from jgpt.loading.load import load_model
from jgpt.loading.measure import evaluate_loaded
from jgpt.run_dir.manifest import read_meta
from jgpt.run_dir.metrics_file import read_metrics


def refused(result, *parts: str) -> None:
    assert (result.code, result.out) == (2, ""), result.err
    assert "error: " in result.err and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


def numbers(result) -> dict[str, float]:
    assert result.code == 0 and result.err.startswith("memory: "), result.err
    rows = re.findall(r"^(\w[\w ]*?)  +([\d.,]+)", result.out, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in rows}


def test_loss_of_the_validation_split_is_that_of_training(trained):
    with jax.numpy_rank_promotion("allow"):
        loaded = load_model(str(trained))
        loss, n_tokens = evaluate_loaded(loaded, blocks([open_token_data(trained / "tokens").val], 16), rows=3)
    assert n_tokens == 128
    assert loss == pytest.approx(read_meta(trained / "checkpoints", 4)["val_loss"], rel=1e-6)


def test_the_command_prints_it_and_measures_other_text_the_same(command, trained, tmp_path):
    found = numbers(command("evaluate", f"--run_dir={trained}"))
    assert found["tokens"] == 128
    assert found["loss"] == pytest.approx(read_meta(trained / "checkpoints", 4)["val_loss"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-3)
    logged = read_metrics(trained / "metrics.jsonl")[-1]["bits_per_byte"]
    assert found["bits per byte"] == pytest.approx(logged, abs=1e-4)
    (tmp_path / "val.txt").write_text(TEXT[-128:])
    other = numbers(command("evaluate", f"--run_dir={trained}", f"--text_glob={tmp_path}/*.txt"))
    assert other == found


def test_text_that_the_model_has_never_seen_is_named_as_such(command, trained, tmp_path):
    (tmp_path / "val.txt").write_text("Съешь ещё этих мягких французских булок. " * 9, encoding="utf-8")
    result = command("evaluate", f"--run_dir={trained}", f"--text_glob={tmp_path}/*.txt")
    assert numbers(result)["loss"] > math.log(50)
    assert "306 characters of the text are not in the model's vocabulary" in result.err and ", and " in result.err
    assert "which guessing among all tokens would give" in result.err and "script" in result.err


def test_an_older_checkpoint_and_a_run_that_was_moved(command, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = numbers(command("evaluate", "--run_dir=moved", "--step=2"))
    assert found["loss"] == pytest.approx(read_meta(trained / "checkpoints", 2)["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--run_dir={tmp}/nothing"], ["there is no directory", "/nothing"]),
        (["--run_dir={run}", "--step=3"], ["step 3 is not among the checkpoints", "Allowed: 2, 4"]),
        (
            ["--run_dir={run}", "--text_glob={tmp}/*.md"],
            ["matches no file", "data.text_glob is --text_glob"],
        ),
        (["--run_dir={run}", "--text_glob={tmp}/empty.txt"], ["the text is too short. At least 2 tokens are needed"]),
        (
            ["--run_dir={run}", "--text_glob={tmp}/bad.txt"],
            ["byte offset 3", "encoding_errors is --encoding_errors"],
        ),
        (["--run_dir={run}", "--text_glob={tmp}/a.jsonl"], ["line 1", "data.text_field is --text_field"]),
    ],
)
def test_bad_input(command, trained, tmp_path, arguments, parts):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.jsonl").write_text('{"body": "b"}')
    refused(command("evaluate", *(a.format(run=trained, tmp=tmp_path) for a in arguments)), *parts)


def test_damage_is_named(command, own_run):
    array = max((own_run / "checkpoints" / "4" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    refused(command("evaluate", f"--run_dir={own_run}"), "checkpoint 4", "is damaged", "--step")
    (own_run / "tokenizer" / "tokenizer.json").unlink()
    refused(command("evaluate", f"--run_dir={own_run}"), str(own_run / "tokenizer"))


def test_tokens_of_another_tokenizer_are_not_measured(command, own_run, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("another alphabet? yes! " * 99)
    shutil.rmtree(own_run / "tokens")
    assert command("prepare", *tiny).code == 0
    refused(command("evaluate", f"--run_dir={own_run}"), "tokens of another tokenizer", "--text_glob=GLOB")


def test_bytes_that_are_not_utf8_can_be_replaced(command, trained, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    arguments = [f"--run_dir={trained}", f"--text_glob={tmp_path}/bad.txt", "--encoding_errors=replace_any"]
    assert numbers(command("evaluate", *arguments))["tokens"] == 12
    assert numbers(command("evaluate", *arguments[:2], "--encoding=cp1252"))["tokens"] == 12
    refused(
        command("evaluate", *arguments[:2], "--encoding=cp125"),
        "--encoding='cp125': it must be another value, such as utf-8",
    )
