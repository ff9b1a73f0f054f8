"""The curves of a run as lines of an SVG picture: it is part of report.html, and follows the page's colors.

In the data path: the records of metrics.jsonl in, what `chart.svg.jinja` draws out. It needs no matplotlib.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jgpt.report.series import LEAST_SMOOTHED, Series, above, limits, series, smooth, ticks
from jgpt.run_dir.metrics_file import best_validation, loss_text
from jgpt.wording import format_count

WIDTH = 900  # of the picture; all lengths are in its pixels
MOST_POINTS = 800  # of a line: more than its pixels show


class Tick(NamedTuple):
    """A place on an axis, and the number that stands there."""

    place: float
    label: str


class Line(NamedTuple):
    """A line: the `d` of an SVG path, and what it is (the class that gives its color)."""

    path: str
    kind: str


class Dot(NamedTuple):
    """A point that is drawn by itself."""

    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Panel:
    """A pair of axes with lines in it; x, y is their upper left corner."""

    title: str
    note: str  # in the upper right corner
    x: float
    y: float
    width: float
    height: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    dots: list[Dot]
    legend: list[tuple[str, str]]  # the kind of a line, what it is
    best: str = ""  # what stands at the last dot


def panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the panels of a run: its loss, learning rate and speed; none without a record to draw."""
    if not any(key in record for record in records for key in ("loss", "val_loss")):
        return []
    rate, speed = series(records, "learning_rate"), series(records, "tokens_per_second")
    last = max(record["step"] for record in records)
    return [
        _loss(records, last),
        _small("learning rate", rate, last, 56, lambda value: f"{value:g}"),
        _small("tokens/s", speed, last, 512, lambda value: format_count(value).replace(".0", "")),
    ]


class _Axes:
    """How steps and values become places in the picture."""

    def __init__(self, x: float, y: float, width: float, height: float, last: int, low: float, high: float) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.last, self.low, self.high = max(1, last), low, high

    def across(self, step: float) -> float:
        return round(self.x + self.width * step / (1.02 * self.last), 1)

    def down(self, value: float) -> float:
        return round(self.y + self.height * (self.high - value) / (self.high - self.low), 1)

    def line(self, found: Series, kind: str) -> Line:
        """Return a line, broken where a value is not finite."""
        parts, pen_is_up = [], True
        for step, value in _thin(list(zip(*found, strict=True))):
            if math.isnan(value):
                pen_is_up = True
                continue
            # What is far above the scale would be a number that no browser draws.
            place = max(-self.height, self.down(value))
            parts.append(f"{'M' if pen_is_up else 'L'}{self.across(step)},{place}")
            pen_is_up = False
        return Line("".join(parts), kind)

    def dots(self, found: Series, kind: str) -> list[Dot]:
        """Return the values that are within the scale as points."""
        inside = [(step, value) for step, value in zip(*found, strict=True) if self.low <= value <= self.high]
        return [Dot(self.across(step), self.down(value), kind) for step, value in inside]

    def steps(self) -> list[Tick]:
        return [Tick(self.across(n), f"{n:,.0f}") for n in ticks(0, self.last, 6) if n == int(n)]

    def values(self, most: int, label: Callable[[float], str]) -> list[Tick]:
        return [Tick(self.down(n), label(n)) for n in ticks(self.low, self.high, most)]


def _loss(records: Sequence[dict[str, Any]], last: int) -> Panel:
    loss, val_loss = series(records, "loss"), series(records, "val_loss")
    low, high = limits(loss[1], val_loss[1])
    axes = _Axes(56, 36, WIDTH - 76, 270, last, low, high)
    lines, dots, legend = [], [], []
    if len(loss[1]) >= LEAST_SMOOTHED:
        lines = [axes.line(loss, "train faint"), axes.line((loss[0], smooth(loss[1])), "train")]
        legend = [("train", "train (smoothed)")]
    elif loss[1]:
        lines, dots, legend = [axes.line(loss, "train")], axes.dots(loss, "train"), [("train", "train")]
    best = best_validation(records)
    if best:
        lines.append(axes.line(val_loss, "validation"))
        legend.append(("validation", "validation"))
        if len(val_loss[1]) <= 50:
            dots += axes.dots(val_loss, "validation")
        dots.append(Dot(axes.across(best["step"]), axes.down(min(best["val_loss"], high)), "best"))
    return Panel(
        "loss (nats per token)", above(loss, high), axes.x, axes.y, axes.width, axes.height, axes.steps(),
        axes.values(8, lambda value: f"{value:g}"), lines, dots, legend,
        f"best validation {loss_text(best)} at step {best['step']:,}" if best else "",
    )  # fmt: skip


def _small(title: str, found: Series, last: int, x: float, label: Callable[[float], str]) -> Panel:
    top = 1.15 * max((value for value in found[1] if value == value), default=0) or 1  # from zero: small looks small
    axes = _Axes(x, 376, 368, 110, last, 0, top)
    dots = axes.dots(found, "train") if len(found[1]) == 1 else []  # a line of one point is invisible
    return Panel(
        title, "", axes.x, axes.y, axes.width, axes.height, axes.steps(), axes.values(5, label),
        [axes.line(found, "train")], dots, [],
    )  # fmt: skip


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keep the lowest and the highest point of each part of a long line, and its gaps."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        by_value = sorted((point for point in part if not math.isnan(point[1])), key=lambda point: point[1])
        kept += sorted({by_value[0], by_value[-1]}) if by_value else part[:1]
    return kept
