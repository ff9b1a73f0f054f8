"""metrics.jsonl: one JSON object for each record of a run, read and written.

In the data path: beside the step. Next: `report/`, which draws what the file holds.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from jgpt.atomic_write import write_file
from jgpt.errors import UserError

MOST_STEPS = 2**63 - 1
LARGEST = 3.5e38  # above float32: what a step computes is smaller, or infinite

log = logging.getLogger("jgpt")


class MetricsLog:
    """metrics.jsonl, opened to go on after `from_step`: one JSON object a line, flushed each time.

    Lines of later steps were written by a killed run after the checkpoint that this one resumes from: they are dropped,
    and so is a torn line, so that the file reads as if nothing had happened.
    """

    def __init__(self, path: Path, from_step: int):
        lines = _read_lines(path)
        records = [_parse(line) for line in lines]
        kept = [line for line, record in zip(lines, records, strict=True) if record and record["step"] <= from_step]
        if damaged := records[:-1].count(None):  # the last line is torn where a run was killed
            log.warning("%s: %d damaged lines are dropped; they are no records of a run", path, damaged)
        if kept != lines:
            write_file(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8", newline="")

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Append a line, and return what it holds.

        Floats are written to their last bit, NaN and infinity as null; keys whose value is None are left out.
        """
        plain = {key: _plain(value) for key, value in record.items() if value is not None}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()
        return plain

    def close(self) -> None:
        self._file.close()


def drop_all(path: Path) -> None:
    """Forget the records of a run that was killed before its first checkpoint, and begins again."""
    if path.exists():
        write_file(path, "")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of metrics.jsonl, without damaged lines; no file is an empty list.

    Each record has a step, a whole number; every value is a finite number, or None for one that was not finite or that
    no run writes. The file may come from anywhere: it is an output of an earlier run. Raises UserError where the name
    is that of something else, or the file cannot be read.
    """
    return [record for line in _read_lines(path) if (record := _parse(line))]


def _read_lines(path: Path) -> list[str]:
    if not os.path.isfile(path):  # unlike Path.is_file, it takes a name of any length
        if os.path.lexists(path):
            raise UserError(f"{path} is not a file. It must be what the run wrote. Put that back, or remove it.")
        return []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return list(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Make it readable (chmod).") from None


def _parse(line: str) -> dict[str, Any] | None:
    """Return the record, or None for a line that no run wrote, or that a kill or a full disk tore (it has no end)."""
    try:
        record = json.loads(line)
        if not line.endswith("\n") or type(record["step"]) is not int or not 0 <= record["step"] <= MOST_STEPS:
            return None
        return {key: None if value is None else _plain(value) for key, value in record.items()}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # RecursionError: nested too deep
        return None


def _plain(value: Any) -> int | float | None:
    """Turn a number of Python, NumPy or JAX into what JSON has; raise TypeError for anything else."""
    if isinstance(value, str):
        raise TypeError(f"{value!r} is not a number")
    number = int(value) if isinstance(value, Integral) else float(value)
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def best_validation(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record with the lowest validation loss."""
    evaluated = [record for record in records if isinstance(record.get("val_loss"), int | float)]
    return min(evaluated, key=lambda record: record["val_loss"], default=None)


def loss_text(record: dict[str, Any]) -> str:
    """Write a record's validation loss, with its bits per byte where it has them."""
    bits = record.get("bits_per_byte")
    return f"{record['val_loss']:.4f}" + (f" ({bits:.3f} bits/byte)" if bits is not None else "")
