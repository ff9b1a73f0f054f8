"""What is left of a run for people to look at: loss.png, samples.txt and a one-page report.html.

In the data path: after the step, beside the checkpoint, made anew at every evaluation from the files of the run
directory alone. A run never fails because of its pictures: whatever goes wrong here is one warning in the log.
"""

import base64
import html
import io
import json
import logging
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jgpt.data.tokenizer import write_file
from jgpt.training.metrics import format_count, format_duration, read_metrics

log = logging.getLogger(__name__)

TRAIN_COLOR, VAL_COLOR, QUIET_COLOR = "#2f6fb3", "#d9541e", "#555555"
SMOOTHED_SHARE = 0.02  # the smoothed curve averages over about this share of the run
SAMPLES_SHOWN = 20  # sets of samples in the report, the newest
Series = tuple[list[int], list[float]]  # steps and values; NaN is a gap


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("%s could not be written, training goes on: %s: %s", what, type(error).__name__, error)


# Curves: metrics.jsonl -> loss.png


def write_curves(run_dir: Path) -> None:
    """Draw loss, learning rate and throughput from metrics.jsonl into loss.png."""
    with _harmless(f"{run_dir / 'loss.png'}"):
        records = read_metrics(run_dir / "metrics.jsonl")
        if not records or not _has_matplotlib():
            return
        picture = io.BytesIO()
        _draw(records, run_dir.resolve().name).savefig(picture, format="png", dpi=120)
        temporary = run_dir / "loss.png.tmp"
        temporary.write_bytes(picture.getvalue())
        temporary.replace(run_dir / "loss.png")


@cache  # said once, not at every evaluation
def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        log.info('loss.png is left out, as matplotlib is not installed: pip install "jgpt[plot]"')
        return False
    return True


def _draw(records: list[dict[str, Any]], title: str) -> Any:
    """Return the matplotlib Figure: not made by pyplot, which would keep it and look for a screen."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6.5), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["loss", "loss"], ["rate", "speed"]], height_ratios=[2.2, 1])
    _draw_loss(axes["loss"], records, title)

    for name, key, label in (("rate", "learning_rate", "learning rate"), ("speed", "tokens_per_second", "tokens/s")):
        steps, values = _series(records, key)
        marker = "o" if len(values) == 1 else ""  # a line of one point is invisible
        axes[name].plot(steps, values, color=TRAIN_COLOR, lw=1.2, marker=marker, ms=4)
        axes[name].set_title(label, loc="left", fontsize=10)
        # From zero, so that a small change does not look like a collapse.
        axes[name].set_ylim(0, 1.15 * max((value for value in values if value == value), default=0) or 1)
    axes["rate"].yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes["speed"].yaxis.set_major_formatter(lambda speed, _: format_count(speed).replace(".0", ""))
    for axis in axes.values():
        axis.set_xlim(0, 1.02 * max(1, records[-1]["step"]))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axis.set_xlabel("optimizer step")
        axis.grid(color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure


def _draw_loss(axis: Any, records: list[dict[str, Any]], title: str) -> None:
    (steps, loss), (val_steps, val_loss) = _series(records, "loss"), _series(records, "val_loss")
    if len(loss) >= 20:
        axis.plot(steps, loss, color=TRAIN_COLOR, alpha=0.3, lw=0.8)
        both_ways = zip(_smooth(loss), reversed(_smooth(loss[::-1])), strict=True)  # one way alone lags behind
        smoothed = [(forward + backward) / 2 for forward, backward in both_ways]
        axis.plot(steps, smoothed, color=TRAIN_COLOR, lw=1.8, label="train (smoothed)")
    elif loss:
        axis.plot(steps, loss, color=TRAIN_COLOR, lw=1.8, marker="o", ms=3, label="train")
    best = best_validation(records)
    if best:
        marker = "o" if len(val_loss) <= 50 else ""
        axis.plot(val_steps, val_loss, color=VAL_COLOR, lw=1.2, marker=marker, ms=4, label="validation")
    low, high = _limits(loss, val_loss)
    axis.set_ylim(low, high)
    if best:
        inside = min(best["val_loss"], high)
        text = f"best validation {_loss_text(best)}\nat step {best['step']:,}"
        axis.plot(best["step"], inside, "o", ms=9, mfc="none", mec=VAL_COLOR, mew=1.5, zorder=3)
        right = best["step"] > records[-1]["step"] / 2
        # Above the curve, which falls: towards the middle of the picture, where it leaves room.
        place = {"xytext": (-4 if right else 12, 42), "textcoords": "offset points", "ha": "right" if right else "left"}
        box = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": "none", "alpha": 0.85}
        arrow = {"arrowstyle": "-", "color": VAL_COLOR, "lw": 0.8}
        axis.annotate(text, (best["step"], inside), color=VAL_COLOR, fontsize=10, bbox=box, arrowprops=arrow, **place)
    hidden = [(step, value) for step, value in zip(steps, loss, strict=True) if value > high]
    if hidden:
        step, value = max(hidden, key=lambda point: point[1])
        note = f"above the scale: train loss up to {value:.4g}, at step {step:,}"
        axis.set_title(note, loc="right", fontsize=8, color=QUIET_COLOR)
    axis.set_ylabel("loss (nats per token)")
    axis.set_title(title.replace("$", r"\$"), loc="left", fontsize=12)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper right", frameon=False)


def _series(records: list[dict[str, Any]], key: str) -> Series:
    """Take the records that have the key; null, which stands for NaN and infinity, becomes NaN."""
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Average exponentially, without the bias of an average that begins at zero; a gap stays a gap."""
    past = 1 - 1 / max(1, SMOOTHED_SHARE * len(values))
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total, weight = past * total + value, past * weight + 1
        smoothed.append(total / weight if math.isfinite(value) else math.nan)
    return smoothed


def _limits(loss: Sequence[float], val_loss: Sequence[float]) -> tuple[float, float]:
    """Choose the y axis for what follows the first drop; rare peaks after it may be cut off as well.

    >>> _limits([9.0, 5.0, *[3.0] * 50], [2.0])
    (1.9, 3.1)
    """
    settled = sorted(value for value in [*loss[len(loss) // 20 :], *val_loss[len(val_loss) // 10 :]] if value == value)
    if not settled:
        return 0.0, 1.0
    low, high = settled[0], settled[min(len(settled) - 1, int(0.99 * len(settled)))]
    margin = 0.1 * (high - low) or 0.5
    return round(low - margin, 6), round(high + margin, 6)


# Samples: texts -> samples.txt

_HEADER = re.compile(r"^=== step (\d+).*, sample \d+ of \d+ ===\n", re.MULTILINE)
_LOOKS_LIKE_HEADER = re.compile(r"^(?=\\*=== step )", re.MULTILINE)


class Sample(NamedTuple):
    """A text of samples.txt, the line above it, and the step that it was made at."""

    step: int
    header: str
    text: str


def append_samples(path: Path, step: int, val_loss: float | None, texts: Sequence[str]) -> None:
    """Append the texts, each under a header line; a line of theirs that could pass for one gets a backslash first."""
    with path.open("a", encoding="utf-8", errors="replace", newline="") as file:
        for i, text in enumerate(texts, 1):
            loss = "" if val_loss is None else f", validation loss {val_loss:.4f}"
            file.write(f"=== step {step}{loss}, sample {i} of {len(texts)} ===\n")
            file.write(_LOOKS_LIKE_HEADER.sub(r"\\", text) + "\n\n")


def read_samples(path: Path) -> list[Sample]:
    """Read samples.txt back, as the texts were; no file is an empty list."""
    text = _read(path)
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers), len(text)][1:]
    return [
        Sample(
            int(header[1]),
            header[0].strip("= \n"),
            re.sub(r"^\\(?=\\*=== step )", "", text[header.end() : end].removesuffix("\n\n"), flags=re.MULTILINE),
        )
        for header, end in zip(headers, ends, strict=True)
    ]


def drop_samples_after(path: Path, step: int) -> None:
    """Forget the samples of later steps, which a killed run made after the checkpoint that this one resumes from."""
    text = _read(path)
    later = [header.start() for header in _HEADER.finditer(text) if int(header[1]) > step]
    if later:  # steps only rise, so that all after the first of them is later as well
        write_file(path, text[: later[0]])


def _read(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.read()


# Report: all of it -> report.html


def best_validation(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record with the lowest validation loss."""
    evaluated = [record for record in records if record.get("val_loss") is not None]
    return min(evaluated, key=lambda record: record["val_loss"], default=None)


def write_report(run_dir: Path) -> None:
    """Put the run on one page, report.html: numbers, curves, samples, config, versions and what to type next.

    The page needs nothing but itself, and leaves out what the run directory does not hold.
    """
    with _harmless(f"{run_dir / 'report.html'}"):
        records = read_metrics(run_dir / "metrics.jsonl")
        status, config, versions = (_read_json(run_dir / f"{name}.json") for name in ("status", "config", "versions"))
        name = run_dir.resolve().name
        body = [
            f"<h1>{_text(name)}</h1>",
            _status_html(status),
            _numbers_html(records, status),
            _curves_html(run_dir / "loss.png"),
            _section("Go on", _commands_html(run_dir, status)),
            _section("Samples", _samples_html(read_samples(run_dir / "samples.txt"))),
            _section("Config", _groups_html(config)),
            _section("Versions", _groups_html(versions)),
        ]
        page = f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n<title>{_text(name)}: jgpt</title>\n{_HEAD}\n"
        write_file(run_dir / "report.html", page + "\n".join(filter(None, body)) + "\n</html>\n")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_read(path) or "{}")


def _text(value: Any) -> str:
    """Escape for HTML, quotes included; what UTF-8 cannot hold (half a surrogate pair) becomes a question mark."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _status_html(status: dict[str, Any]) -> str:
    if "state" not in status:
        return ""
    rest = [f"step {status['step']:,}"] if "step" in status else []
    rest += [str(status["reason"])] if status.get("reason") else []
    state = _text(status["state"])
    return f'<p><span class="state {state}">{state}</span> {_text(": ".join(rest))}</p>'


def _loss_text(record: dict[str, Any]) -> str:
    bits = record.get("bits_per_byte")
    return f"{record['val_loss']:.4f}" + (f" ({bits:.3f} bits/byte)" if bits is not None else "")


def _numbers_html(records: list[dict[str, Any]], status: dict[str, Any]) -> str:
    """Show the run in a row of large numbers."""
    latest = {key: value for record in records for key, value in record.items() if value is not None}
    numbers = []
    if best := best_validation(records):
        numbers.append((f"{best['val_loss']:.4f}", f"best validation loss, at step {best['step']:,}"))
        if best.get("bits_per_byte") is not None:
            numbers.append((f"{best['bits_per_byte']:.3f}", "bits per byte"))
        numbers.append((f"{math.exp(min(best['val_loss'], 700)):.4g}", "perplexity per token"))
    elif "loss" in latest:
        numbers.append((f"{latest['loss']:.4f}", "train loss"))
    if "tokens" in latest:
        numbers.append((format_count(latest["tokens"]), "tokens seen"))
    if "elapsed_seconds" in latest:
        numbers.append((format_duration(latest["elapsed_seconds"]), "time"))
    speeds = sorted(record["tokens_per_second"] for record in records if record.get("tokens_per_second") is not None)
    if speeds:
        numbers.append((format_count(speeds[len(speeds) // 2]), "tokens/s (median)"))
    if "mfu" in latest:
        numbers.append((f"{latest['mfu']:.0%}", "model FLOPs utilization"))
    cells = "".join(f"<div><b>{_text(value)}</b>{_text(label)}</div>" for value, label in numbers)
    return f'<div class="numbers">{cells}</div>' if cells else ""


def _curves_html(path: Path) -> str:
    if not path.exists():
        return ""
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="loss, learning rate and throughput over the steps" src="data:image/png;base64,{image}">'


def _commands_html(run_dir: Path, status: dict[str, Any]) -> str:
    generate = f"python -m jgpt.generate --run_dir {shlex.quote(str(run_dir))} --prompt 'Once upon a time'"
    commands = [("Write text", generate)]
    if status.get("resume_command") and status.get("state") != "finished":
        commands.insert(0, ("Resume", status["resume_command"]))
    return "".join(f"<p>{label}</p><pre>{_text(command)}</pre>" for label, command in commands)


def _samples_html(samples: list[Sample]) -> str:
    """Show the newest samples, and the older ones folded."""
    steps = sorted({sample.step for sample in samples}, reverse=True)
    parts = []
    for step in steps[:SAMPLES_SHOWN]:
        texts = [sample for sample in samples if sample.step == step]
        content = "".join(f"<pre>{_text(sample.text)}</pre>" for sample in texts)
        summary = _text(texts[0].header.rsplit(", sample", 1)[0])
        parts.append(f"<details{' open' if step == steps[0] else ''}><summary>{summary}</summary>{content}</details>")
    if len(steps) > SAMPLES_SHOWN:
        parts.append(f"<p>Samples of {len(steps) - SAMPLES_SHOWN} earlier steps are in samples.txt.</p>")
    return "\n".join(parts)


def _groups_html(values: dict[str, Any]) -> str:
    """Lay nested values out as tables, one for each group."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    groups = [("", plain), *((key, value) for key, value in values.items() if isinstance(value, dict))]
    tables = []
    for name, group in groups:
        rows = "".join(f"<tr><td>{_text(key)}<td>{_text(_value(value))}" for key, value in group.items())
        caption = f"<caption>{_text(name)}</caption>" if name else ""
        tables += [f"<table>{caption}{rows}</table>"] if rows else []
    return f'<div class="tables">{"".join(tables)}</div>' if tables else ""


def _value(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " …"  # a long list of globs; the file has all of it


_HEAD = """<meta name=viewport content="width=device-width">
<meta name=color-scheme content="light dark">
<style>
:root { --quiet: #666; --panel: #f4f4f2; --line: #ddd }
@media screen and (prefers-color-scheme: dark) {
  :root { --quiet: #aaa; --panel: #26282b; --line: #444 }
  html { background: #17181a; color: #e6e6e6 }
  img { filter: invert(.9) hue-rotate(180deg) }  /* the picture has a white ground: turn it dark, and keep its hues */
}
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 2rem 0 .5rem; font-size: 1.15rem } p { margin: .4rem 0 }
.state { padding: .1rem .6rem; border-radius: 1rem; background: #666; color: #fff; font-weight: 600 }
.finished { background: #1a7f4b } .running { background: #2f6fb3 } .failed { background: #b3261e }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.numbers div { padding: .6rem .8rem; border-radius: .4rem; background: var(--panel); color: var(--quiet);
  font-size: .8rem }
.numbers b { display: block; color: CanvasText; font-size: 1.3rem; white-space: nowrap }
img { width: 100%; border-radius: .4rem }
pre { margin: .3rem 0 .8rem; padding: .6rem .8rem; border-radius: .4rem; background: var(--panel); font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--quiet) }
.tables { columns: 22rem; column-gap: 1.5rem }
table { width: 100%; margin-bottom: 1rem; border-collapse: collapse; break-inside: avoid; font-size: .85rem }
caption { text-align: left; font-weight: 600 }
td { padding: .15rem .5rem .15rem 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere }
td:first-child { width: 50%; color: var(--quiet); overflow-wrap: normal }
@media print {
  body { margin: 0; max-width: none } h2 { break-after: avoid } pre, .numbers div { border: 1px solid #ccc }
  .tables { columns: 2 }
}
</style>"""
