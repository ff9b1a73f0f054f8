"""The curves of several runs in one picture, over tokens and over time.

Beside the data path: what `comparison.py` read, in; an image file out. It needs matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jgpt.atomic_write import atomic_file
from jgpt.errors import UserError
from jgpt.report.comparison import ComparedRun, Comparison
from jgpt.report.fonts import drawable
from jgpt.report.series import smooth
from jgpt.wording import format_count

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colors, which color-blind people can tell apart, without the pale yellow; then again with dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
DASHES = ("-", "--", ":", "-.")


def check_picture(path: Path) -> None:
    """Raise UserError for a file that no picture can be written to."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--out={path}: the suffix must be one of {', '.join(FORMATS)}. For example: --out compare.png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out={path}: there is no folder {path.absolute().parent}. Make it, or name another.")


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the validation curves. Raises UserError where the file cannot be written."""
    try:
        with atomic_file(path) as file:
            _figure(comparison).savefig(file, format=path.suffix.lower().lstrip("."), dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Name another file by --out.") from None


def _figure(comparison: Comparison) -> Any:
    from matplotlib.figure import Figure

    rows = -(-len(comparison.runs) // 2)
    figure = Figure(figsize=(11, 5 + 0.22 * rows), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    unit, seconds = _unit(max((run.last("elapsed_seconds") or 0 for run in comparison.runs), default=0))
    bottoms, tops = [], []
    for n, run in enumerate(comparison.runs):
        records, values, is_train = _curve(run, comparison.measure)
        look = {"color": COLORS[n % len(COLORS)], "lw": 1.6, "ls": DASHES[n // len(COLORS) % len(DASHES)]}
        look |= {"marker": "o" if len(records) <= 50 and not is_train else "", "ms": 3.5}
        name, fonts = drawable(run.name)
        label = f"{n + 1}  {name}{' (training text, smoothed)' if is_train else ''}".replace("$", r"\$")
        left.plot([record.get("tokens", 0) for record in records], values, label=label, **look)
        right.plot([(record.get("elapsed_seconds") or 0) / seconds for record in records], values, **look)
        if values:
            bottoms.append(min(values))
            tops.append(max(values[max(1, len(values) // 10) :] or values))  # without the first drop
    if bottoms:
        margin = 0.08 * (max(tops) - min(bottoms)) or 0.5
        left.set_ylim(min(bottoms) - margin, max(tops) + margin)
    left.set_ylabel("validation loss (nats per token)" if comparison.by_loss else "validation, bits per byte")
    left.set_xlabel("tokens seen")
    left.xaxis.set_major_formatter(lambda n, _: format_count(n).replace(".0", ""))
    right.set_xlabel(f"time ({unit})")
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.grid(color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    families = list(dict.fromkeys(family for run in comparison.runs for family in drawable(run.name)[1]))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, prop={"family": families, "size": 9})
    return figure


def _curve(run: ComparedRun, measure: str) -> tuple[list[dict[str, Any]], Sequence[float], bool]:
    """Return the records of a run's curve and their values: of the validation text, else of the training text."""
    records = [record for record in run.records if record.get(measure) is not None]
    if records or measure != "val_loss":
        return records, [record[measure] for record in records], False
    records = [record for record in run.records if record.get("loss") is not None]
    return records, smooth([record["loss"] for record in records]), True


def _unit(seconds: float) -> tuple[str, float]:
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return unit, size
    return "seconds", 1.0
