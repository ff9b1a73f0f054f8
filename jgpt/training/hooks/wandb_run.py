"""A copy of metrics.jsonl for Weights & Biases: sent while the run trains, or kept in its directory to be sent later.

Beside the data path: `trackers.py` opens it, and turns its errors into warnings. It never asks anything on a terminal:
without a key, or without a way to the server, it is offline.
"""

import hashlib
import json
import logging
import netrc
import os
import shutil
import socket
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jgpt.redaction import redact

SERVER = "https://api.wandb.ai"
REACH_SECONDS = 3.0  # to open a connection
FINISH_SECONDS = "30"  # to send the rest at the end; wandb 0.31 knows the setting, others wait as long as it takes

log = logging.getLogger("jgpt")


class WandbRun:
    """A run of Weights & Biases, always the same one for a run directory."""

    def __init__(
        self, run_dir: Path, project: str, about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Open the run: its name is the directory's, its id follows from the first of the run's records."""
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
        self._wandb, self._run_dir = wandb, run_dir
        self._id = hashlib.sha256(json.dumps(records[0]).encode()).hexdigest()[:16]
        mode, reason = _mode()
        if mode == "offline":
            self._remove_earlier()
        try:
            self._run = self._open(mode, project, about)
        except Exception as error:
            if mode != "online":
                raise
            mode, reason = "offline", f"the server refused it ({redact(str(error))[:200]})"
            self._run = self._open(mode, project, about)
        folder = Path(self._run.dir).parent
        if mode == "online":
            log.info("wandb: %s", self._run.url)
        elif mode == "offline":
            log.info("wandb: offline, as %s. To send it later: wandb sync %s", reason, folder)

    def _open(self, mode: str, project: str, about: Mapping[str, Any]) -> Any:
        # What it would collect by itself (the command line, the code, the output) may hold what is not for others.
        quiet = self._wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True
        )
        name = self._run_dir.resolve().name
        return self._wandb.init(
            project=project, name=name, id=self._id, resume="allow", dir=str(self._run_dir), mode=mode,
            config=dict(about), settings=quiet,
        )  # fmt: skip

    def _remove_earlier(self) -> None:
        """Remove this run's earlier copies, which were not sent: the new one gets all their records."""
        for folder in (self._run_dir / "wandb").glob(f"offline-run-*-{self._id}"):
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] >= self._run.step:  # the server has the others
            values = {
                name: float("nan") if value is None else value for name, value in record.items() if name != "step"
            }
            self._run.log(values, step=record["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _mode() -> tuple[str, str]:
    """Return wandb's mode, and why it is offline where nobody asked for that."""
    asked = os.environ.get("WANDB_MODE", "online")
    if asked != "online":
        return ("offline" if asked == "dryrun" else asked), f"WANDB_MODE={asked}"
    server = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", SERVER))
    host = server.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _has_password(host):
        return "offline", "there is no key (the variable WANDB_API_KEY, or: wandb login)"
    try:
        socket.create_connection((host, server.port or (80 if server.scheme == "http" else 443)), REACH_SECONDS).close()
    except OSError:
        return "offline", f"{host} cannot be reached"
    return "online", ""


def _has_password(host: str) -> bool:
    """Tell whether `wandb login` has left a key for this host, where libraries keep passwords."""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError):
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False
