"""metrics.jsonl: one JSON object for each record of a run, read and written.

In the data path: beside the step. Next: `report/`, which draws what the file holds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from jgpt.atomic_write import write_file


class MetricsLog:
    """metrics.jsonl, opened to go on after `from_step`: one JSON object a line, flushed each time.

    Lines of later steps were written by a killed run after the checkpoint that this one resumes from: they are dropped,
    and so is a torn line, so that the file reads as if nothing had happened.
    """

    def __init__(self, path: Path, from_step: int):
        lines = _read_lines(path)
        kept = [line for line in lines if (record := _parse(line)) and record["step"] <= from_step]
        if kept != lines:
            write_file(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", newline="")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line: floats to their last bit, NaN and infinity as null, keys whose value is None left out."""
        plain = {key: _plain(value) for key, value in record.items() if value is not None}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without lines that are torn; no file is an empty list."""
    return [record for line in _read_lines(path) if (record := _parse(line))]


def _read_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(file)


def _parse(line: str) -> dict[str, Any] | None:
    """Return the record, or None for a line that a kill or a full disk has torn (a line without its end is one).

    A record has a step, a whole number; what has none was not written by a run.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and type(record.get("step")) is int and line.endswith("\n")
    return record if whole else None


def _plain(value: Any) -> int | float | str | None:
    """Turn a number of Python, NumPy or JAX into what JSON has."""
    if isinstance(value, str):
        return value
    number = int(value) if isinstance(value, Integral) else float(value)
    return number if math.isfinite(number) else None


def best_validation(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record with the lowest validation loss."""
    evaluated = [record for record in records if isinstance(record.get("val_loss"), int | float)]
    return min(evaluated, key=lambda record: record["val_loss"], default=None)


def loss_text(record: dict[str, Any]) -> str:
    """Write a record's validation loss, with its bits per byte where it has them."""
    bits = record.get("bits_per_byte")
    return f"{record['val_loss']:.4f}" + (f" ({bits:.3f} bits/byte)" if bits is not None else "")
