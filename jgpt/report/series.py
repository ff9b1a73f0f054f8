"""The numbers behind the curves: a series from the records, smoothed, within limits, with ticks.

In the data path: metrics.jsonl in; `curves.py`, `chart.py` and `compare_picture.py` draw what is here.
"""

import math
from collections.abc import Sequence
from typing import Any

TRAIN_COLOR, VAL_COLOR, QUIET_COLOR = "#2f6fb3", "#d9541e", "#555555"
SMOOTHED_SHARE = 0.02  # the smoothed curve averages over about this share of the run,
SMOOTHED_POINTS = 3  # and over at least so many points
LEAST_SMOOTHED = 20  # points: fewer are drawn as they are
Series = tuple[list[int], list[float]]  # steps and values; NaN is a gap


def series(records: Sequence[dict[str, Any]], key: str) -> Series:
    """Return the steps and values of the records that have the key. Null stands for NaN or infinity: it becomes NaN."""
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Average over the neighbours on both sides, as one direction alone lags behind; a gap stays a gap."""
    both_ways = zip(_average(values), reversed(_average(values[::-1])), strict=True)
    return [(forward + backward) / 2 for forward, backward in both_ways]


def _average(values: Sequence[float]) -> list[float]:
    """Return the exponential average, corrected for its start at zero (as in Adam)."""
    past = 1 - 1 / max(SMOOTHED_POINTS, SMOOTHED_SHARE * len(values))
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total, weight = past * total + value, past * weight + 1
        smoothed.append(total / weight if math.isfinite(value) else math.nan)
    return smoothed


def limits(loss: Sequence[float], val_loss: Sequence[float]) -> tuple[float, float]:
    """Choose the limits of the y axis from the values after the first drop; rare later peaks may be cut off too.

    >>> limits([9.0, 5.0, *[3.0] * 50], [2.0])
    (1.9, 3.1)
    """
    shown = sorted(value for value in [*loss[len(loss) // 20 :], *val_loss[len(val_loss) // 10 :]] if value == value)
    if not shown:
        return 0.0, 1.0
    low, high = shown[0], shown[min(len(shown) - 1, int(0.99 * len(shown)))]
    margin = 0.1 * (high - low) or 0.5
    return round(low - margin, 6), round(high + margin, 6)


def above(loss: Series, high: float) -> str:
    """Say how far the training loss goes above the scale; "" where it does not."""
    hidden = [(step, value) for step, value in zip(*loss, strict=True) if value > high]
    if not hidden:
        return ""
    step, value = max(hidden, key=lambda point: point[1])
    return f"above the scale: train loss up to {value:.4g}, at step {step:,}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`, `most` of them at most, 1, 2 or 5 times a power of ten apart.

    >>> ticks(0, 800, 5), ticks(1.9, 3.1, 7)
    ([0.0, 200.0, 400.0, 600.0, 800.0], [2.0, 2.2, 2.4, 2.6, 2.8, 3.0])
    """
    power = 10 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    raise AssertionError((low, high, most))
