"""The report of a run: files of the run directory in, one page report.html out.

In the data path: the last step of a run. This file collects the data, `page.html.jinja` lays them out with
`chart.svg.jinja`, `page.css` styles them.
"""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from jgpt.atomic_write import write_file
from jgpt.redaction import redact_values, redactor
from jgpt.report.chart import Panel, panels
from jgpt.report.warn_on_error import warn_on_error
from jgpt.run_dir.metrics_file import best_validation, read_metrics
from jgpt.run_dir.samples import Sample, read_samples
from jgpt.wording import format_count, format_duration

SAMPLES_SHOWN = 20  # steps whose samples are in the report: the newest
LONGEST_VALUE = 200  # characters of a config value, such as a list of globs; config.json has all of it


class Number(NamedTuple):
    """A number that is shown in large type, and what it is."""

    value: str
    label: str


class Command(NamedTuple):
    """A command to type next, and what it does."""

    label: str
    line: str


class SampleGroup(NamedTuple):
    """The texts that the model wrote at one step."""

    title: str
    texts: list[str]


class Table(NamedTuple):
    """A group of settings. The settings outside any group have the empty title."""

    title: str
    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. Empty fields are left out of it."""

    name: str
    state: str
    progress: str
    numbers: list[Number]
    curves: list[Panel]
    commands: list[Command]
    samples: list[SampleGroup]
    more_samples: int  # earlier steps whose samples are only in samples.txt
    config: list[Table]
    versions: list[Table]


def write_report(run_dir: Path) -> None:
    """Write report.html: numbers, curves, samples, config, versions and the commands to type next.

    The page is one file that loads nothing else. It leaves out what the run directory does not hold. An error becomes
    a warning.
    """
    with warn_on_error(f"{run_dir / 'report.html'}"):
        write_file(run_dir / "report.html", render(collect(run_dir)))


def render(report: Report) -> str:
    """Return the page as HTML, every value escaped, and no secret in it."""
    hide = redactor()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: hide(value) if type(value) is str else value,  # Markup is escaped, and was redacted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template("page.html.jinja").render(report=report)
    return page.encode("utf-8", "replace").decode()  # half of a surrogate pair becomes a question mark


def collect(run_dir: Path) -> Report:
    """Read the run directory into a Report."""
    records = read_metrics(run_dir / "metrics.jsonl")
    status, config, versions = (_read_json(run_dir / f"{name}.json") for name in ("status", "config", "versions"))
    samples = read_samples(run_dir / "samples.txt")
    steps = sorted({sample.step for sample in samples}, reverse=True)
    return Report(
        name=run_dir.resolve().name,
        state=str(status.get("state", "")),
        progress=_progress(status),
        numbers=_numbers(records),
        curves=panels(records),
        commands=_commands(run_dir, status),
        samples=[_sample_group(samples, step) for step in steps[:SAMPLES_SHOWN]],
        more_samples=len(steps[SAMPLES_SHOWN:]),
        config=_tables(config),
        versions=_tables(versions),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read an object, and hide secrets before a value is shortened."""
    return redact_values(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _progress(status: dict[str, Any]) -> str:
    step = f"step {status['step']:,}" if "step" in status else ""
    total = f" of {status['total_steps']:,}" if step and "total_steps" in status else ""
    return ": ".join(part for part in (step + total, str(status.get("reason") or "")) if part)


def _numbers(records: list[dict[str, Any]]) -> list[Number]:
    latest = {key: value for record in records for key, value in record.items() if value is not None}
    numbers = []
    if best := best_validation(records):
        numbers.append(Number(f"{best['val_loss']:.4f}", f"best validation loss, at step {best['step']:,}"))
        if best.get("bits_per_byte") is not None:
            numbers.append(Number(f"{best['bits_per_byte']:.3f}", "bits per byte"))
        numbers.append(Number(f"{math.exp(min(best['val_loss'], 700)):.4g}", "perplexity per token"))
    elif "loss" in latest:
        numbers.append(Number(f"{latest['loss']:.4f}", "train loss"))
    if "tokens" in latest:
        numbers.append(Number(format_count(latest["tokens"]), "tokens seen"))
    if "elapsed_seconds" in latest:
        numbers.append(Number(format_duration(latest["elapsed_seconds"]), "time"))
    speeds = sorted(record["tokens_per_second"] for record in records if record.get("tokens_per_second") is not None)
    if speeds:
        numbers.append(Number(format_count(speeds[len(speeds) // 2]), "tokens/s (median)"))
    if "mfu" in latest:
        numbers.append(Number(f"{latest['mfu']:.0%}", "model FLOPs utilization"))
    return numbers


def _commands(run_dir: Path, status: dict[str, Any]) -> list[Command]:
    tried = status.get("try_command") or f"python -m jgpt.generate --model {shlex.quote(str(run_dir))}"
    commands = [Command("Chat" if "jgpt.chat" in tried else "Write text", str(tried))]
    if status.get("resume_command") and status.get("state") != "finished":
        commands.insert(0, Command("Resume", str(status["resume_command"])))
    return commands


def _sample_group(samples: list[Sample], step: int) -> SampleGroup:
    found = [sample for sample in samples if sample.step == step]
    return SampleGroup(found[0].header.rsplit(", sample", 1)[0], [sample.text for sample in found])


def _tables(values: dict[str, Any], title: str = "") -> list[Table]:
    """Make one table of each group of nested values; the values outside a group come first."""
    rows = [(key, _value_text(value)) for key, value in values.items() if not isinstance(value, dict)]
    tables = [Table(title, rows)] if rows else []
    for key, value in values.items():
        if isinstance(value, dict):
            tables += _tables(value, f"{title}.{key}".lstrip("."))
    return tables


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + " …"
