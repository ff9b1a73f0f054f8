"""The curves of a run: metrics.jsonl in, loss.png out.

In the data path: beside the checkpoints. The picture is drawn again behind an evaluation.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jgpt.atomic_write import atomic_file
from jgpt.report.fonts import drawable
from jgpt.report.series import LEAST_SMOOTHED, QUIET_COLOR, TRAIN_COLOR, VAL_COLOR, above, limits, series, smooth
from jgpt.report.warn_on_error import warn_on_error
from jgpt.run_dir.metrics_file import best_validation, loss_text, read_metrics
from jgpt.wording import format_count

SHARE = 0.05  # of a run's time, at most, that goes into the picture while it trains

log = logging.getLogger(__name__)


class LivePicture:
    """loss.png while a run trains: where evaluations are seconds apart, not every one of them is drawn."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._next = -math.inf

    def write(self, run_dir: Path) -> None:
        """Draw it again, unless the last time was only just now."""
        began = self._clock()
        if began >= self._next:
            write_curves(run_dir)
            ended = self._clock()
            self._next = ended + (ended - began) / SHARE


def write_curves(run_dir: Path) -> None:
    """Draw loss, learning rate and tokens per second from metrics.jsonl into loss.png. An error becomes a warning."""
    with warn_on_error(f"{run_dir / 'loss.png'}"):
        records = read_metrics(run_dir / "metrics.jsonl")
        if not records or not _has_matplotlib():
            return
        with atomic_file(run_dir / "loss.png") as file:
            _draw(records, run_dir.resolve().name).savefig(file, format="png", dpi=120)


@cache  # so that the line is logged once, not at every evaluation
def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        log.info('loss.png is not drawn because matplotlib is not installed: pip install "jgpt[plot]"')
        return False
    return True


def _draw(records: list[dict[str, Any]], title: str) -> Any:
    """Return a matplotlib Figure. pyplot is not used: it keeps every figure in memory and looks for a screen."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6.5), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["loss", "loss"], ["rate", "speed"]], height_ratios=[2.2, 1])
    _draw_loss(axes["loss"], records, title)

    for name, key, label in (("rate", "learning_rate", "learning rate"), ("speed", "tokens_per_second", "tokens/s")):
        steps, values = series(records, key)
        marker = "o" if len(values) == 1 else ""  # a line of one point is invisible
        axes[name].plot(steps, values, color=TRAIN_COLOR, lw=1.2, marker=marker, ms=4)
        axes[name].set_title(label, loc="left", fontsize=10)
        # The axis starts at zero, so that a small change looks small.
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
    (steps, loss), (val_steps, val_loss) = series(records, "loss"), series(records, "val_loss")
    if len(loss) >= LEAST_SMOOTHED:
        axis.plot(steps, loss, color=TRAIN_COLOR, alpha=0.3, lw=0.8)
        axis.plot(steps, smooth(loss), color=TRAIN_COLOR, lw=1.8, label="train (smoothed)")
    elif loss:
        axis.plot(steps, loss, color=TRAIN_COLOR, lw=1.8, marker="o", ms=3, label="train")
    best = best_validation(records)
    if best:
        marker = "o" if len(val_loss) <= 50 else ""
        axis.plot(val_steps, val_loss, color=VAL_COLOR, lw=1.2, marker=marker, ms=4, label="validation")
    low, high = limits(loss, val_loss)
    axis.set_ylim(low, high)
    if best:
        inside = min(best["val_loss"], high)
        # What is said of it stands in the legend: beside the point it would hide a part of the curves.
        text = f"best validation {loss_text(best)} at step {best['step']:,}"
        axis.plot(best["step"], inside, "o", ms=9, mfc="none", mec=VAL_COLOR, mew=1.5, zorder=3, ls="", label=text)
    if note := above((steps, loss), high):
        axis.set_title(note, loc="right", fontsize=8, color=QUIET_COLOR)
    axis.set_ylabel("loss (nats per token)")
    shown, families = drawable(title)
    axis.set_title(shown.replace("$", r"\$"), loc="left", fontsize=12, fontfamily=families)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper right", frameon=False)
