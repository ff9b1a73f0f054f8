"""`jgpt compare`: the table, the picture, and what cannot be compared."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from test_report import make_run, trained

from jgpt import wording
from jgpt.config import default_config
from jgpt.report.compare_picture import draw
from jgpt.report.comparison import compare
from jgpt.wording import display_width


def run_of(folder: Path, name: str, better: float = 0.0, tokenizer: str = "{}", **changes: Any) -> str:
    """Write a run with 40 steps, whose losses are lower by `better`."""
    records = [
        {key: value - better if "loss" in key else value for key, value in record.items()}
        for record in trained(40, every_eval=10)
    ]
    run_dir = make_run(folder / name, records)
    config = default_config()
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    (run_dir / "config.json").write_text(config.to_json(), encoding="utf-8")
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    return str(run_dir)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return Path("runs")


def test_the_table_has_the_numbers_in_columns_of_the_terminal(folder: Path, command: Command) -> None:
    names = run_of(folder, "中文故事"), run_of(folder, "b", better=0.2, optimizer__learning_rate=0.002)
    result = command("compare", *names, "--out=")
    assert result.code == 0, result.err
    head, first, second = result.out.split("\n\n")[0].splitlines()
    assert head.split() == "run best val at step last val bits/byte steps tokens time tokens/s".split()
    assert first.split() == [
        "1",
        "runs/中文故事",
        "2.3000",
        "40",
        "2.3000",
        "1.0250",
        "40",
        "4.0k",
        "1m",
        "20s",
        "10.0k",
    ]
    assert display_width(head) == display_width(first) == display_width(second)
    assert "best: runs/b, 2.1000 nats per token" in result.out
    assert ["optimizer.learning_rate", "0.001", "0.002"] in [line.split() for line in result.out.splitlines()]
    assert "out_dir" not in result.out and not Path("compare.png").exists()


def test_the_picture_has_a_line_for_each_run(folder: Path, command: Command) -> None:
    image = pytest.importorskip("matplotlib.image")
    names = [run_of(folder, name, better=0.1 * n) for n, name in enumerate(("中文故事", "_b$_{x", "c"))]
    result = command("compare", *names)
    assert result.code == 0 and "picture: compare.png" in result.err
    pixels = image.imread("compare.png")
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (abs(pixels[..., :3] * 255 - color).max(axis=-1) < 3).sum() > 50, color
    assert sorted(path.name for path in Path().iterdir()) == ["compare.png", "runs"]


def test_json_holds_it_all(folder: Path, command: Command) -> None:
    names = run_of(folder, "中文"), run_of(folder, "b", model__n_layers=2)
    result = command("compare", *names, "--json", "--out=")
    found = json.loads(result.out)
    assert "中文" in result.out and found["comparable_by_loss"]
    assert found["config_differences"] == {"model.n_layers": [6, 2]}
    first = found["runs"][0]
    assert first.pop("run") == names[0]
    assert first == pytest.approx(
        {"best_val_loss": 2.3, "best_step": 40, "last_val_loss": 2.3, "bits_per_byte": 1.025, "steps": 40,
         "tokens": 4000, "hours": 80 / 3600, "tokens_per_second": 1e4}
    )  # fmt: skip


def test_other_tokenizers_are_compared_by_bits_per_byte(folder: Path) -> None:
    found = compare([run_of(folder, "a"), run_of(folder, "b", tokenizer="{ }")])
    assert not found.by_loss and found.measure == "bits_per_byte"
    text = found.as_text()
    assert (
        "different tokenizers" in text and "Bits per byte can." in text and "best: runs/a, 1.0250 bits per byte" in text
    )


def test_other_texts_are_said(folder: Path) -> None:
    found = compare([run_of(folder, "a"), run_of(folder, "b", data__text_glob="文本/*.txt")])
    assert not found.by_loss and "different validation texts" in found.as_text()
    assert found.differences["data.text_glob"][1] == "文本/*.txt"


def test_the_tokens_tell_the_text_where_they_are_there(trained_twice: list[str]) -> None:
    same = compare(trained_twice[:2])
    assert same.by_loss and not any("tokens of" in note for note in same.notes)
    other = compare([trained_twice[0], trained_twice[2]])
    assert not other.by_loss and any("different validation texts" in note for note in other.notes)


@pytest.fixture
def trained_twice(trained: Path, tmp_path: Path) -> list[str]:
    """Return a trained run, its copy that was moved, and one whose tokens are those of a longer text."""
    from jgpt.data.token_directory import read_token_meta, write_token_meta

    names = [str(trained), str(shutil.copytree(trained, tmp_path / "a")), str(shutil.copytree(trained, tmp_path / "b"))]
    meta = read_token_meta(tmp_path / "b" / "tokens")
    del meta["meta_sha256"]
    write_token_meta(tmp_path / "b" / "tokens", meta | {"train_bytes": meta["train_bytes"] + 1})
    return names


def test_another_share_of_the_validation_text_is_said(folder: Path) -> None:
    found = compare([run_of(folder, "a"), run_of(folder, "b", eval__batches=5)])
    assert (
        found.by_loss and "different parts of the validation text (1: 20 batches of 32 x 256 tokens" in found.as_text()
    )


def test_runs_without_evaluation_config_or_end_are_compared_as_far_as_it_goes(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [run_of(folder, "a"), str(make_run(folder / "b", trained(3))), str(make_run(folder / "c", [{"step": 1}]))]
    found = compare(names)
    assert "runs/b, runs/c has no config.json" in found.as_text()
    assert found.as_text().count(" - ") > 5
    draw(found, Path("all.svg"))
    assert Path("all.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no runs were given"),
        (["runs/quickstart"], "one run was given"),
        (["runs/quickstart", "runs/quickstrat"], "no such directory"),
        (["runs/quickstart", "quickstart"], "Did you mean runs/quickstart?"),
        (["runs/quickstart", "runs/quickstrat"], "Did you mean runs/quickstart?"),
        (["runs/quickstart", "runs/empty"], "no metrics.jsonl with a record"),
        (["runs/quickstart", "runs/odd"], "metrics.jsonl is not a file"),
        (["runs/quickstart", "x" * 300], "no such directory"),
        (["runs/quickstart", "runs/../runs/quickstart/"], "was given twice"),
        (["runs/quickstart", "runs/b", "--out=a.jpeg"], "must be one of .png, .svg, .pdf"),
        (["runs/quickstart", "runs/b", "--out=gone/a.png"], "there is no folder"),
    ],
)
def test_mistakes_are_one_clear_error(folder: Path, command: Command, arguments: list[str], message: str) -> None:
    run_of(folder, "quickstart")
    run_of(folder, "b")
    (folder / "empty").mkdir()
    (folder / "odd" / "metrics.jsonl").mkdir(parents=True)
    result = command("compare", *arguments)
    assert result.code == 2 and result.err.startswith("error: ") and message in result.err
    assert "Traceback" not in result.err and not list(Path().glob("*.*"))


def test_without_matplotlib_there_is_the_table_and_how_to_get_the_picture(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = command("compare", run_of(folder, "a"), run_of(folder, "b"))
    assert result.code == 0 and "best val" in result.out and 'pip install "jgpt[plot]"' in result.err
    assert not Path("compare.png").exists()


def test_losses_of_a_run_that_diverged_keep_the_columns_narrow(folder: Path, command: Command) -> None:
    """And numbers that no run writes are no numbers: a picture with them would never be done."""
    names = run_of(folder, "a"), run_of(folder, "b")
    lines = ['{"step": 1, "tokens": 10, "val_loss": 3e38}', '{"step": 2, "tokens": 1e308, "val_loss": -1e308}']
    (folder / "b" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = command("compare", *names)
    assert result.code == 0 and Path("compare.png").stat().st_size
    assert result.out.splitlines()[2].split()[2:5] == ["3e+38", "1", "3e+38"]


def test_a_long_value_is_shortened_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(wording, "display_width", lambda text: measured.append(len(text)) or display_width(text))
    assert wording.shorten("文" * 5000, 8) == "文文文…"
    assert sum(measured) < 5100
