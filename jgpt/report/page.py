"""What is left of a run for people to look at: a one-page report.html.

In the data path: at the end, from the files of the run directory alone.
"""

import base64
import html
import json
import math
import shlex
from pathlib import Path
from typing import Any

from jgpt.atomic_write import write_file
from jgpt.report.curves import harmless
from jgpt.run_dir.metrics_file import best_validation, read_metrics
from jgpt.run_dir.samples import Sample, read_samples
from jgpt.wording import format_count, format_duration

SAMPLES_SHOWN = 20  # sets of samples in the report, the newest


def write_report(run_dir: Path) -> None:
    """Put the run on one page, report.html: numbers, curves, samples, config, versions and what to type next.

    The page needs nothing but itself, and leaves out what the run directory does not hold.
    """
    with harmless(f"{run_dir / 'report.html'}"):
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
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
