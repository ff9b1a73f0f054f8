"""metrics.jsonl, speed and the lines on the terminal: what a user sees while a run trains."""

import io
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from jgpt.cli.terminal import TerminalHandler, accept_all_characters
from jgpt.run_dir.metrics_file import MetricsLog, best_validation, read_metrics
from jgpt.training.progress import Progress, Throughput, format_line


def write(path: Path, steps: range, from_step: int = 0) -> None:
    run = MetricsLog(path, from_step)
    for step in steps:
        run.write({"step": step, "loss": 1 / step})
    run.close()


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    write(tmp_path / "whole.jsonl", range(1, 11))
    write(tmp_path / "killed.jsonl", range(1, 8))
    with (tmp_path / "killed.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    write(tmp_path / "killed.jsonl", range(5, 11), from_step=4)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


HOSTILE = (
    '{"step": null}', '{"step": "4"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', '{"loss": 1.0}', "[" * 10**5,
    '{"step": 4, "loss": {"a": 1}}', '{"step": 4, "loss": "x"}', '{"step": 4, "loss": ' + "9" * 5000 + "}",
    '{"step": ' + "9" * 400 + "}", '{"step": 4, "val_loss": ' + "[" * 100_000 + "}", "null", '"step"',
)  # fmt: skip


def test_lines_that_no_run_wrote_are_left_out_with_a_warning(tmp_path: Path, caplog) -> None:
    """As in an output of somebody else; what is not finite is None, as a run writes it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in (*HOSTILE, '{"step": 1, "val_loss": NaN, "loss": 1e999}')))
    assert read_metrics(path) == [{"step": 1, "val_loss": None, "loss": None}]
    assert best_validation(read_metrics(path)) is None
    log = logging.getLogger("jgpt")
    log.addHandler(caplog.handler)
    MetricsLog(path, from_step=9).close()
    log.removeHandler(caplog.handler)
    assert f"{len(HOSTILE)} damaged lines are dropped" in caplog.text and len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "12\n", "\x00\x00", "[1]\n"])
def test_a_torn_line_is_passed_over_and_mended(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_bytes()
    path.write_text(whole.decode() + torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    MetricsLog(path, from_step=9).close()
    assert path.read_bytes() == whole


def test_a_whole_file_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    before = path.stat().st_ino
    MetricsLog(path, from_step=3).close()
    assert path.stat().st_ino == before


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_lines_are_valid_json_at_full_precision_and_there_at_once(tmp_path: Path) -> None:
    run = MetricsLog(tmp_path / "metrics.jsonl", 0)
    loss = np.float32(2.3456789)
    run.write({"step": np.int32(7), "loss": loss, "grad_norm": math.nan, "loss_scale": np.float32("inf"), "mfu": None})
    text = (tmp_path / "metrics.jsonl").read_text()  # before close
    run.close()
    assert "NaN" not in text and "Infinity" not in text
    record = json.loads(text, parse_constant=pytest.fail)
    assert record == {"step": 7, "loss": float(loss), "grad_norm": None, "loss_scale": None}
    assert np.float32(record["loss"]) == loss and isinstance(record["step"], int)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_counts_training_time_alone() -> None:
    clock = Clock()
    watch = Throughput(100, 10, tokens_per_step=50, flops_per_token=6.0, peak_flops=1000.0, clock=clock)
    clock.now += 5
    with watch.pause():
        clock.now += 5
    speed = watch.measure(20)
    assert speed.tokens_per_second == pytest.approx(100)
    assert speed.mfu == pytest.approx(0.6)
    assert speed.eta_seconds == pytest.approx(80)  # half a second a step, and as much for what pauses it
    clock.now += 5
    assert watch.measure(30).tokens_per_second == pytest.approx(100)  # the pause belongs to its own window


def test_eta_is_smooth_and_forgets_what_a_restart_ends() -> None:
    clock = Clock()
    watch = Throughput(100, 0, tokens_per_step=1, flops_per_token=1.0, peak_flops=None, clock=clock)
    clock.now += 60  # the first step compiles
    watch.restart(1)
    assert watch.measure(1).eta_seconds is None
    clock.now += 9
    assert watch.measure(10).eta_seconds == pytest.approx(90)
    clock.now += 20
    speed = watch.measure(20)
    assert speed.tokens_per_second == pytest.approx(0.5) and speed.mfu is None
    assert 80 < speed.eta_seconds < 160  # type: ignore[operator]


RECORD = {"step": 120, "loss": 2.34561, "learning_rate": 9.9e-4, "grad_norm": 0.83, "tokens_per_second": 12_345.0}


def test_line_shows_fp16_columns_only_where_there_are_any() -> None:
    assert "scale" not in format_line(RECORD, 1000)
    line = format_line({**RECORD, "loss_scale": 32768.0, "skipped_steps": 2, "mfu": 0.31}, 1000, 252)
    assert line.startswith("step  120/1000  loss  2.3456  lr 9.9e-04  grad  0.83  ")
    assert line.endswith("scale 32768  skipped 2   12.3k tok/s  mfu  31%  ETA 4m 12s")


def test_columns_stay_where_they_are() -> None:
    other = {"step": 5, "loss": 10.8, "learning_rate": 1e-5, "grad_norm": 12.5, "tokens_per_second": 950.0}
    lines = [format_line(record, 1000, 60) for record in (RECORD, other, {**RECORD, "loss": math.nan})]
    assert len({line.index("ETA") for line in lines}) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stdout: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    """Log two records as the loop does, and return what stdout got."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.delenv("COLUMNS", raising=False)  # tqdm cuts the bar to it
    logger, handler = logging.getLogger("jgpt"), TerminalHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        progress = Progress(1000, first_step=100)
        for step in (110, 120):
            progress.update(step)
            progress.log({**RECORD, "step": step}, eta_seconds=252)
        progress.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return stdout.getvalue()


def test_plain_output_is_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(io.StringIO(), monkeypatch).splitlines()
    assert lines == [format_line({**RECORD, "step": step}, 1000, 252) for step in (110, 120)]


def test_terminal_has_a_bar_below_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = show(Terminal(), monkeypatch)
    lines = [line.rpartition("\r")[2] for line in shown.split("\n")]
    assert lines[:2] == [format_line({**RECORD, "step": step}, 1000, 252) for step in (110, 120)]
    assert "120/1000, ETA 4m 12s" in shown  # the bar: a line has "120/1000  loss"


def test_a_terminal_that_lacks_a_character_gets_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    accept_all_characters()
    TerminalHandler().handle(logging.makeLogRecord({"msg": "a 漢 sample"}))
    assert ascii_only.buffer.getvalue() == b"a \\u6f22 sample\n"  # type: ignore[attr-defined]


def test_a_closed_pipe_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    TerminalHandler().handle(logging.makeLogRecord({"msg": "line"}))
