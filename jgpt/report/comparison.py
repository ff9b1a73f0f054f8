"""Several runs side by side: what each reached, whether that can be compared, and where their configs differ.

Beside the data path: run directories in, a table and facts out. `compare_picture.py` draws the curves.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jgpt.config.defaults import default_config, flatten
from jgpt.config.files import user_path
from jgpt.data.token_directory import read_token_meta, token_directory
from jgpt.errors import UserError
from jgpt.run_dir.metrics_file import best_validation, read_metrics
from jgpt.wording import format_count, format_duration, shorten, table

LONGEST_NAME, LONGEST_VALUE = 40, 30  # columns of the terminal
TEXT_KEYS = ("text_glob", "format", "text_field", "val_fraction", "encoding", "encoding_errors")


@dataclass(frozen=True)
class ComparedRun:
    """A run: its name as it was given, its records and settings, and what its loss was measured with and on."""

    name: str
    records: list[dict[str, Any]]
    settings: dict[str, Any]  # its config, flat; {} where it is gone
    tokenizer: str  # a hash of it
    text: str  # what tells its validation text from others; "" where its tokens are gone
    text_by_config: str  # what the config says of it
    measured: str  # how much of the validation text, in blocks of which length

    @property
    def best(self) -> dict[str, Any]:
        """The record with the lowest validation loss; {} without one."""
        return best_validation(self.records) or {}

    def last(self, key: str) -> Any:
        """Return the last value of a key that is not null; None without one."""
        return next((record[key] for record in reversed(self.records) if record.get(key) is not None), None)

    def numbers(self) -> dict[str, Any]:
        """Return what the run reached, for a program; None where it has no such record."""
        speeds = sorted(record["tokens_per_second"] for record in self.records if record.get("tokens_per_second"))
        seconds = self.last("elapsed_seconds")
        return {
            "run": self.name,
            "best_val_loss": self.best.get("val_loss"),
            "best_step": self.best.get("step"),
            "last_val_loss": self.last("val_loss"),
            "bits_per_byte": self.best.get("bits_per_byte"),
            "steps": self.last("step"),
            "tokens": self.last("tokens"),
            "hours": None if seconds is None else seconds / 3600,
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        }


@dataclass(frozen=True)
class Comparison:
    """Runs, whether their losses can be compared, and the keys in which their configs differ."""

    runs: list[ComparedRun]
    by_loss: bool
    notes: list[str]
    differences: dict[str, list[Any]]  # key: the value in each run

    @property
    def measure(self) -> str:
        """The key of the records by which the runs are compared."""
        return "val_loss" if self.by_loss else "bits_per_byte"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for a program."""
        runs = [run.numbers() for run in self.runs]
        facts = {"comparable_by_loss": self.by_loss, "notes": self.notes, "config_differences": self.differences}
        return {"runs": runs} | facts

    def as_text(self) -> str:
        """Return the tables, and what is to be said about them."""
        head = ["", "run", "best val", "at step", "last val", "bits/byte", "steps", "tokens", "time", "tokens/s"]
        rows = [head, *([str(n), *_row(run)] for n, run in enumerate(self.runs, 1))]
        parts = [table(rows, left=(0, 1))]
        reached = [run for run in self.runs if run.best.get(self.measure) is not None]
        if len(reached) > 1:
            best = min(reached, key=lambda run: run.best[self.measure])
            unit = "nats per token" if self.by_loss else "bits per byte"
            parts.append(f"best: {best.name}, {_loss(best.best[self.measure])} {unit}")
        parts += [f"note: {note}" for note in self.notes]
        if self.differences:
            head = ["config", *(str(n) for n in range(1, len(self.runs) + 1))]
            rows = [head, *([key, *map(_shown, values)] for key, values in self.differences.items())]
            parts.append(table(rows, left=range(len(head))))
        elif all(run.settings for run in self.runs):
            parts.append("The configs are the same.")
        return "\n\n".join(parts)


def _row(run: ComparedRun) -> list[str]:
    found = run.numbers()
    columns: dict[str, Callable[[Any], str]] = {
        "best_val_loss": _loss, "best_step": "{:,}".format, "last_val_loss": _loss, "bits_per_byte": _loss,
        "steps": "{:,}".format, "tokens": format_count, "hours": lambda hours: format_duration(3600 * hours),
        "tokens_per_second": format_count,
    }  # fmt: skip
    cells = ["-" if found[key] is None else written(found[key]) for key, written in columns.items()]
    return [shorten(run.name, LONGEST_NAME), *cells]


def _loss(value: float) -> str:
    """Write a loss; one of a run that diverged may have 38 digits."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def _shown(value: Any) -> str:
    as_it_is = isinstance(value, str) and value and value.isprintable()
    return "-" if value is None else shorten(value if as_it_is else repr(value), LONGEST_VALUE)


def compare(names: Sequence[str]) -> Comparison:
    """Compare the runs in these directories. Raises UserError where one of them holds no run, or is given twice."""
    if len(names) < 2:
        raise UserError(
            f"{'one run was' if names else 'no runs were'} given. Needed: the directories of two or more. For example:"
            " jgpt compare runs/a runs/b"
        )
    places: dict[Path, str] = {}
    for name in names:
        if (place := user_path(name).resolve()) in places:
            raise UserError(f"{name} was given twice (as {places[place]}). Give each run once.")
        places[place] = name
    runs = [open_run(name) for name in names]
    same_tokenizer = len({run.tokenizer for run in runs}) == 1
    same_text = len({run.text if all(run.text for run in runs) else run.text_by_config for run in runs}) == 1
    return Comparison(runs, same_tokenizer and same_text, _notes(runs, same_tokenizer, same_text), _differences(runs))


def open_run(name: str) -> ComparedRun:
    """Read what a run directory says of its run. Raises UserError where it is none."""
    run_dir = user_path(name).absolute()
    records = read_metrics(run_dir / "metrics.jsonl")
    if not records:
        there = "there is no such directory" if not os.path.isdir(run_dir) else "it has no metrics.jsonl with a record"
        raise UserError(
            f"{name} is no run: {there} (current folder: {Path.cwd()}).{_did_you_mean(run_dir)} Allowed: a directory"
            " that training wrote (config.out_dir)."
        )
    settings = _read_settings(run_dir)
    tokenizer_file = run_dir / "tokenizer" / "tokenizer.json"
    if tokenizer_file.is_file():
        tokenizer = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    else:
        tokenizer = repr({key: value for key, value in settings.items() if key.startswith("tokenizer.")})
    text, by_config = _text(run_dir, settings, tokenizer), repr([settings.get(f"data.{key}") for key in TEXT_KEYS])
    length = settings.get("batch.sequence_length") or settings.get("model.context_length")
    measured = f"{settings.get('eval.batches')} batches of {settings.get('batch.global_batch_size')} x {length} tokens"
    return ComparedRun(name.rstrip("/") or name, records, settings, tokenizer, text, by_config, measured)


def _read_settings(run_dir: Path) -> dict[str, Any]:
    """Return the run's config, flat; keys that are newer than the run have their defaults. {} where it is gone."""
    try:
        own = flatten(json.loads((run_dir / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return flatten(json.loads(default_config().to_json())) | own


def _text(run_dir: Path, settings: dict[str, Any], tokenizer: str) -> str:
    """Return what tells a run's validation text from others; "" where its tokens are not there any more.

    The same documents, with as many bytes in all, of which the same share is held out, are taken for the same text.
    """
    place = default_config()
    place.out_dir, place.data.cache_dir = str(run_dir), str(settings.get("data.cache_dir", ""))
    meta = read_token_meta(token_directory(place))
    if meta.get("tokenizer_sha256") != tokenizer:  # none, or another run's
        return ""
    sizes = [meta.get("format"), meta.get("n_documents"), meta.get("train_bytes", 0) + meta.get("val_bytes", 0)]
    return repr([*sizes, settings.get("data.val_fraction")])


def _notes(runs: list[ComparedRun], same_tokenizer: bool, same_text: bool) -> list[str]:
    notes = []
    if not same_tokenizer:
        notes.append(
            "the runs have different tokenizers, so a token of one is not a token of the other: their losses cannot be"
            " compared. Bits per byte can."
        )
    if not same_text:
        notes.append(
            "the runs were measured on different validation texts: their losses cannot be compared. Bits per byte can,"
            " as far as the texts are alike. To measure each on one text: jgpt evaluate --model RUN --text_glob FILES"
        )
    if gone := [run.name for run in runs if not run.text]:
        names = ", ".join(gone)
        notes.append(f"the tokens of {names} are not there: whether the texts are the same is taken from config.json.")
    if same_text and len({run.measured for run in runs}) > 1:
        measured = ", ".join(f"{n}: {run.measured}" for n, run in enumerate(runs, 1))
        notes.append(
            f"the runs were measured on different parts of the validation text ({measured}): small"
            " differences mean nothing. See eval.batches."
        )
    if gone := [run.name for run in runs if not run.settings]:
        notes.append(f"{', '.join(gone)} has no config.json that can be read.")
    return notes


def _differences(runs: list[ComparedRun]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys if key != "out_dir"}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _did_you_mean(run_dir: Path) -> str:
    """Name a run with almost this name, beside it or in runs/."""
    folders = [run_dir.parent, Path("runs")]
    known = {path.parent.name: path.parent for folder in folders for path in folder.glob("*/metrics.jsonl")}
    close = difflib.get_close_matches(run_dir.name, known, 1)
    if not close:
        return ""
    found = known[close[0]]
    return f" Did you mean {found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found}?"
