"""loss.png, samples.txt and report.html, for every kind of run directory and of text."""

import html.parser
import json
import logging
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from jgpt.report import chart, curves
from jgpt.report.curves import write_curves
from jgpt.report.fonts import drawable
from jgpt.report.page import SAMPLES_SHOWN, write_report
from jgpt.report.series import limits
from jgpt.run_dir.metrics_file import MetricsLog
from jgpt.run_dir.samples import append_samples, drop_samples_after, read_samples

NASTY = "<script>alert('x')</script> & \"quotes\"</pre>\n=== step 5, sample 1 of 1 ===\n\\=== step 6\n\r\n\x85漢\n\n"


def make_run(run_dir: Path, records: list[dict[str, Any]]) -> Path:
    run_dir.mkdir(exist_ok=True)
    run = MetricsLog(run_dir / "metrics.jsonl", 0)
    for record in records:
        run.write(record)
    run.close()
    return run_dir


def trained(n_steps: int, gap: range = range(0), every_eval: int = 0) -> list[dict[str, Any]]:
    records = []
    for step in range(1, n_steps + 1):
        loss = math.nan if step in gap else 2 + 8 / step
        speed = {"tokens_per_second": 1e4, "mfu": 0.3, "tokens": step * 100, "elapsed_seconds": 2.0 * step}
        records.append({"step": step, "loss": loss, "learning_rate": 1e-3, **speed})
        if every_eval and step % every_eval == 0:
            records.append({"step": step, "val_loss": 2.1 + 8 / step, "bits_per_byte": 1.0 + 1 / step})
    return records


RUNS = {
    "one point": trained(1),
    "no validation": trained(30),
    "one evaluation": [{"step": 5, "val_loss": 2.0}],
    "gap": trained(50, gap=range(20, 30), every_eval=10),
    "never finite": trained(30, gap=range(31)),
    "validation not finite": [*trained(3), {"step": 3, "val_loss": math.inf}],
    "many": trained(300, every_eval=3),
    "zero learning rate": [{"step": 0, "loss": 2.0, "learning_rate": 0.0}],
}


@pytest.fixture
def no_warning(caplog: pytest.LogCaptureFixture) -> Any:
    """Fail when a warning was logged: in the report an error is only a warning, in its tests it must not pass."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", RUNS)
def test_curves_are_drawn(tmp_path: Path, name: str, no_warning: None) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    write_curves(make_run(tmp_path / "a $run$_{x", RUNS[name]))
    pixels = image.imread(tmp_path / "a $run$_{x" / "loss.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    blue = (pixels[..., 2] - pixels[..., 0] > 0.3).sum()
    orange = (pixels[..., 0] - pixels[..., 2] > 0.4).sum()
    has_loss = any(math.isfinite(record.get("loss", math.nan)) for record in RUNS[name])
    has_val = any(math.isfinite(record.get("val_loss", math.nan)) for record in RUNS[name])
    assert (blue > 100) == (has_loss or name == "never finite")  # which still has its learning rate
    assert (orange > 100) == has_val
    assert sorted(path.name for path in (tmp_path / "a $run$_{x").iterdir()) == ["loss.png", "metrics.jsonl"]


def test_no_words_lie_over_the_curves() -> None:
    """What is said of the best point stands in the legend, where the falling curves leave room."""
    pytest.importorskip("matplotlib")
    loss = curves._draw(RUNS["many"], "run").axes[0]
    assert not loss.texts
    legend = loss.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "train (smoothed)", "validation", "best validation 2.1267 (1.003 bits/byte) at step 300",
    ]  # fmt: skip


def test_loss_axis_leaves_out_the_first_values_and_rare_peaks() -> None:
    low, high = limits([1e6, *[50.0] * 3, *[3 + 1 / i for i in range(1, 200)], 1e9], [3.0, 2.9])
    assert 2.8 < low < 2.9 and 3 < high < 5
    assert limits([math.nan], []) == (0, 1)
    assert limits([3.0], []) == (2.5, 3.5)


def test_no_matplotlib_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    curves._has_matplotlib.cache_clear()
    try:
        for _ in range(3):
            write_curves(make_run(tmp_path, RUNS["one point"]))
    finally:
        curves._has_matplotlib.cache_clear()
    assert len(caplog.records) == 1 and 'pip install "jgpt[plot]"' in caplog.text
    assert not (tmp_path / "loss.png").exists()


def test_an_error_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path, RUNS["gap"])
    (tmp_path / "status.json").write_text("{ torn")
    write_report(tmp_path)
    write_curves(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "report.html" in caplog.text


class Page(html.parser.HTMLParser):
    """The tags and the text of a page, as an HTML parser reads them."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_escapes_every_value_and_loads_nothing(tmp_path: Path, no_warning: None) -> None:
    run_dir = make_run(tmp_path / "<b>&run", RUNS["gap"])
    append_samples(run_dir / "samples.txt", 50, 2.3, [NASTY])
    evil = "<img src=http://x>\"'&\ud800"
    status = {"state": f'" onload={evil}', "step": 50, "reason": evil, "resume_command": evil}
    (run_dir / "status.json").write_text(json.dumps(status))
    (run_dir / "config.json").write_text(json.dumps({evil: evil, "group<b>": {evil: [evil], "empty": ""}}))
    (run_dir / "versions.json").write_text(json.dumps({"jax": evil, "python": None}))
    write_curves(run_dir)
    write_report(run_dir)
    source = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not {"script", "link", "b>"} & {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("svg") == 1 and not re.search(r"url\((?!#)", source)
    assert not {"src", "href", "xlink:href"} & {name for _, attributes in page.tags for name in attributes}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert('x')</script>" in page.text and page.text.count("<img src=http://x>\"'&?") >= 7


def test_groups_in_groups_have_tables_of_their_own(tmp_path: Path, no_warning: None) -> None:
    config = {"seed": 1, "model": {"rope_scaling": {"kind": "yarn", "factor": 2.0}, "n_layers": 3}}
    (make_run(tmp_path, RUNS["one point"]) / "config.json").write_text(json.dumps(config))
    write_report(tmp_path)
    words = Page((tmp_path / "report.html").read_text()).text.partition("\nConfig\n")[2].split()
    assert words == "seed1 model n_layers3 model.rope_scaling kindyarn factor2.0".split()


@pytest.mark.parametrize("name", RUNS)
def test_the_report_has_the_curves_without_matplotlib(
    tmp_path: Path, name: str, no_warning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(make_run(tmp_path, RUNS[name]))
    page = Page((tmp_path / "report.html").read_text())
    assert [attributes["viewbox"] for tag, attributes in page.tags if tag == "svg"] == ["0 0 900 520"]
    drawn = {
        kind: [attributes["d"] or "" for tag, attributes in page.tags if tag == "path" and attributes["class"] == kind]
        for kind in ("line train", "line train faint", "line validation")
    }
    finite = [kind for kind in ("loss", "val_loss") if any(math.isfinite(r.get(kind, math.nan)) for r in RUNS[name])]
    assert len(drawn["line validation"]) == 2 * ("val_loss" in finite)  # the curve, and its line in the legend
    assert len(drawn["line train faint"]) == (len(RUNS[name]) >= 30)
    points = re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", " ".join(sum(drawn.values(), [])))
    assert all(0 <= float(x) <= 900 and -270 <= float(y) <= 520 for x, y in points)
    if name == "gap":
        assert drawn["line train faint"][0].count("M") == 2


def test_a_long_curve_keeps_its_peaks_and_gaps_in_few_points() -> None:
    loss = [3 + math.sin(step / 50) for step in range(100_000)]
    loss[77_777], loss[50_000:51_000] = 9.0, [math.nan] * 1000
    thin = chart._thin(list(enumerate(loss)))
    assert len(thin) <= chart.MOST_POINTS + 2
    assert (77_777, 9.0) in thin and min(value for _, value in thin if value == value) < 2.01
    assert any(value != value and 50_000 <= step < 51_000 for step, value in thin)


def test_a_name_that_no_font_can_draw_is_left_out_without_a_warning(
    tmp_path: Path, no_warning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    font_manager = pytest.importorskip("matplotlib.font_manager").fontManager
    monkeypatch.setattr(font_manager, "ttflist", [font for font in font_manager.ttflist if "DejaVu" in font.name])
    drawable.cache_clear()
    assert [drawable(text)[0] for text in ("中文故事", "run 中文-2", "Größe", "中-文")] == ["", "run -2", "Größe", ""]
    write_curves(make_run(tmp_path / "中文故事", RUNS["many"]))  # in tests a warning is an error
    assert (tmp_path / "中文故事" / "loss.png").stat().st_size > 10_000
    drawable.cache_clear()


def test_a_font_that_has_the_characters_draws_them(tmp_path: Path, no_warning: None) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"font.family": "cmr10", "axes.formatter.use_mathtext": True}):  # it has no Cyrillic
        drawable.cache_clear()
        text, families = drawable("Привет")
        assert text == "Привет" and len(families) == 2
        write_curves(make_run(tmp_path / "Привет", RUNS["one point"]))
    drawable.cache_clear()


def test_report_has_the_numbers(tmp_path: Path, no_warning: None) -> None:
    run_dir = make_run(tmp_path / "run", [*trained(200, every_eval=100), {"step": 201, "val_loss": 9.0}])
    status = {"state": "stopped", "step": 201, "reason": "deadline", "resume_command": "python -m jgpt.train --again"}
    (run_dir / "status.json").write_text(json.dumps(status))
    write_report(run_dir)
    text = Page((run_dir / "report.html").read_text()).text
    for expected in (
        "2.1400",
        "at step 200",
        "1.005",
        "8.499",
        "20.0k",
        "6m 40s",
        "10.0k",
        "30%",
        "stopped",
        "deadline",
    ):
        assert expected in text
    assert "python -m jgpt.train --again" in text
    assert f"python -m jgpt.generate --model {run_dir}" in text


@pytest.mark.parametrize("records", [[], RUNS["one point"], RUNS["never finite"]])
def test_report_leaves_out_what_is_missing(tmp_path: Path, records: list[dict[str, Any]], no_warning: None) -> None:
    write_report(make_run(tmp_path, records))
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Samples" not in text and "Config" not in text and "Resume" not in text


def test_report_folds_old_samples_and_stops_at_very_old_ones(tmp_path: Path, no_warning: None) -> None:
    for step in range(1, SAMPLES_SHOWN + 4):
        append_samples(tmp_path / "samples.txt", step, None, [f"text of {step}."])
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    details = [attributes for tag, attributes in page.tags if tag == "details"]
    assert len(details) == SAMPLES_SHOWN and ["open" in each for each in details].count(True) == 1
    assert "text of 4." in page.text and "text of 3." not in page.text and "3 earlier steps" in page.text


def nasty_text(seed: int) -> str:
    pieces = [
        "=== step 5, sample 1 of 2 ===",
        "=== step 7",
        "\\",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        "===",
        " ",
        "a",
        "\u2028",
        "",
    ]
    return "".join(random.Random(seed).choices(pieces, k=25))


def test_samples_come_back_as_they_were_and_a_resume_drops_the_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    texts = {step: [NASTY, "", "\n", *(nasty_text(100 * step + i) for i in range(40))] for step in range(4)}
    expected = []
    for step in texts:
        append_samples(path, step, 2.0 if step % 2 else None, texts[step])
        expected.append(path.read_bytes())
    assert [(sample.step, sample.text) for sample in read_samples(path)] == [
        (step, text) for step in texts for text in texts[step]
    ]
    assert read_samples(path)[-1].header == "step 3, validation loss 2.0000, sample 43 of 43"
    for step in (3, 2, 0):
        drop_samples_after(path, step)
        assert path.read_bytes() == expected[step]
    drop_samples_after(path, -1)
    assert path.read_bytes() == b"" and read_samples(path) == []


def test_no_samples_is_nothing_to_drop(tmp_path: Path) -> None:
    drop_samples_after(tmp_path / "samples.txt", 3)
    assert read_samples(tmp_path / "samples.txt") == [] and not (tmp_path / "samples.txt").exists()


def test_the_picture_of_a_run_that_trains_takes_a_small_share_of_its_time(tmp_path: Path, monkeypatch):
    """An evaluation a second, and drawing takes a second too: one is drawn, and 20 seconds later the next."""
    now, drawn = [0.0], []

    def draw(run_dir: Path) -> None:
        drawn.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(curves, "write_curves", draw)
    picture = curves.LivePicture(clock=lambda: now[0])
    while now[0] < 60:
        picture.write(tmp_path)
        now[0] += 1.0
    assert drawn == [0.0, 21.0, 42.0]
