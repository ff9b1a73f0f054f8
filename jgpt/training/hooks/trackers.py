"""Every record of metrics.jsonl for TensorBoard and Weights & Biases, where `logging` asks for them.

Beside the data path: `log.py` hands each record on. Both logs are copies of metrics.jsonl. A run that goes on gives
them its earlier records again, so that no step is missing, and none is there twice, whenever they were turned on. What
fails here costs the copy, and never the run.
"""

import importlib.util
import json
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.redaction import redact
from jgpt.run_dir.metrics_file import read_metrics
from jgpt.training.hooks.wandb_run import WandbRun

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # the key of `logging`, what it needs

log = logging.getLogger("jgpt")


class Tracker(Protocol):
    """A copy of metrics.jsonl in the form of another program."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; None stands for a number that is not finite."""

    def close(self, failed: bool) -> None:
        """Finish the copy; `failed` tells that an error ended the run."""


def check_trackers(config: ConfigDict) -> None:
    """Raise UserError where the package of a log that the config asks for is not installed."""
    lacking = [name for name, package in PACKAGES.items() if config.logging[name] and not _is_installed(package)]
    if lacking:
        keys = " and ".join(f"logging.{name}=true" for name in lacking)
        packages = " and ".join(PACKAGES[name] for name in lacking)
        raise UserError(
            f'{keys}: {packages} is not installed. Install it: pip install "jgpt[{",".join(lacking)}]" (or: pip install'
            f" {packages.replace(' and', '')}), or leave the setting out: metrics.jsonl has all numbers."
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # what is loaded under this name has no spec
        return False


class Trackers:
    """The copies that a run's config asks for; the first failure of one is a warning, and ends it."""

    def __init__(self, run_dir: Path, config: ConfigDict) -> None:
        self._run_dir, self._config = run_dir, config
        self._open: dict[str, Tracker] | None = None  # from the first record on

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record, which metrics.jsonl has already, to each."""
        if self._open is not None:
            self._write(record)
            return
        self._open = {}
        wanted = [name for name in PACKAGES if self._config.logging[name]]
        records = read_metrics(self._run_dir / "metrics.jsonl") if wanted else []
        for name in wanted:
            self._try(name, lambda name=name: self._start(name, records))
        for earlier in records:
            self._write(earlier)

    def close(self, failed: bool) -> None:
        """Finish all; `failed` tells that an error ended the run."""
        for name, tracker in list((self._open or {}).items()):
            self._try(name, lambda tracker=tracker: tracker.close(failed))
        self._open = {}

    def _start(self, name: str, records: list[dict[str, Any]]) -> None:
        assert self._open is not None
        versions = self._run_dir / "versions.json"
        about = {"config": json.loads(self._config.to_json())}
        about["versions"] = json.loads(versions.read_text(encoding="utf-8")) if versions.is_file() else {}
        if name == "tensorboard":
            self._open[name] = TensorBoard(self._run_dir / "tensorboard", about, records)
        else:
            self._open[name] = WandbRun(self._run_dir, self._config.logging.wandb_project, about, records)

    def _write(self, record: Mapping[str, Any]) -> None:
        for name, tracker in list((self._open or {}).items()):
            self._try(name, lambda tracker=tracker: tracker.write(record))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever the package raises
            reason = redact(f"{type(error).__name__}: {error}")
            log.warning("%s: nothing more is logged there, training continues: %s", name, reason)
            if self._open and (broken := self._open.pop(name, None)):
                with suppress(Exception):
                    broken.close(failed=True)


class TensorBoard:
    """An event file in the run directory, written by tensorboardX's writer: one event for each record.

    It is written in this thread: tensorboardX's SummaryWriter has a thread, and waits for ever where that one failed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Begin a new file, in place of those of the run's earlier processes; the records give its clock."""
        with _without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._began = time.time() - (records[-1].get("elapsed_seconds") or 0.0)  # had the run never been stopped
        folder.mkdir(exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._file = event_file_writer.EventsWriter(str(folder / "events"))
        # A TensorBoard that is open drops what it has read from the files before this one.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(self._event(wall_time=self._began, step=0, session_log=start))
        for name, values in about.items():
            in_markdown = textwrap.indent(json.dumps(values, indent=2, ensure_ascii=False), "    ")
            text = summary.text(name, in_markdown)
            self._file.write_event(self._event(wall_time=self._began, step=0, summary=text))

    def write(self, record: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float("nan") if value is None else value)
            for name, value in record.items() if name != "step"
        ]  # fmt: skip
        wall_time = self._began + (record.get("elapsed_seconds") or 0.0)
        summary = self._summary(value=values)
        self._file.write_event(self._event(wall_time=wall_time, step=record["step"], summary=summary))
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()


@contextmanager
def _without_torch() -> Iterator[None]:
    """Import without PyTorch, which tensorboardX loads where it finds it, with CUDA libraries of its own."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
