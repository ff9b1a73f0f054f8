"""Upload a run's newest checkpoint while it trains: Kaggle may delete what a killed session has written.

Beside the data path: the loop calls `Uploads.saved` after each save. Another process (`publish.py`) does the upload, so
it cannot stop or slow down training, and can be killed when it hangs.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

from ml_collections import ConfigDict

from jgpt.kaggle.session.paths import scratch_dir
from jgpt.kaggle.session.publish import check_target, copy_tree
from jgpt.redaction import redact
from jgpt.wording import format_duration

MOST_SECONDS = 3600.0  # for one upload while the run trains
LAST_SECONDS = 1200.0  # for the last upload: on Kaggle one hour is left after the deadline

log = logging.getLogger("jgpt")


class Uploads:
    """Uploads the newest whole checkpoint and the small files of a run to `checkpoint.upload`; does nothing for "".

    As a context manager it uploads the last one at the end, within LAST_SECONDS, also when the run failed.

    Raises UserError at once where nothing can be uploaded from here.
    """

    def __init__(self, checkpoint: ConfigDict) -> None:
        self._where, self._every_seconds = checkpoint.upload, checkpoint.upload_every_minutes * 60
        if self._where:
            check_target(self._where)
        self._newest: tuple[Path, int] | None = None  # run directory and step that were saved last
        self._sent = -1  # the step that arrived last
        self._due = 0.0  # on time.monotonic()'s clock
        self._reason = ""  # of the last failure in the log
        self._sender: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    def saved(self, run_dir: Path, step: int) -> None:
        """Remember a new whole checkpoint; start to upload it when it is due and no other upload is running."""
        if not self._where:
            return
        self._newest = run_dir, step
        if time.monotonic() >= self._due and not (self._sender and self._sender.is_alive()):
            self._start(MOST_SECONDS)

    def _start(self, seconds: float) -> None:
        assert self._newest is not None
        run_dir, step = self._newest
        try:
            staged = Path(tempfile.mkdtemp(dir=scratch_dir(), prefix="upload-"))
        except OSError as error:
            return self._failed(step, str(error))
        try:  # before we return: the next save may delete this checkpoint
            copy_tree(run_dir, staged, "tokens", "checkpoints")
            (staged / "checkpoints").mkdir()
            copy_tree(run_dir / "checkpoints" / str(step), staged / "checkpoints" / str(step))
            shutil.copyfile(run_dir / "checkpoints" / f"{step}.sha256", staged / "checkpoints" / f"{step}.sha256")
        except (OSError, shutil.Error) as error:
            shutil.rmtree(staged, ignore_errors=True)
            return self._failed(step, str(error))
        self._sender = threading.Thread(target=self._send, args=(staged, step, seconds), name="upload", daemon=True)
        self._sender.start()

    def _send(self, staged: Path, step: int, seconds: float) -> None:
        """Run the process that uploads, to its end or for at most `seconds`."""
        began = time.monotonic()
        command = [sys.executable, "-m", "jgpt.kaggle.session.publish", str(staged), self._where]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        try:
            # In its own process group: Ctrl-C stops the run and not the upload of its last checkpoint.
            process = self._process = subprocess.Popen(
                command, env=environment, start_new_session=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            with process:
                output = _communicate(process, seconds)
            lines, code = output.strip().splitlines(), process.returncode
        except OSError as error:
            lines, code = [str(error)], 1
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        if code:
            return self._failed(step, lines[-1].removeprefix("error: ") if lines else f"exit code {code}")
        self._sent, self._due, self._reason = step, time.monotonic() + self._every_seconds, ""
        log.info("checkpoint %d was uploaded to %s in %.0f s", step, lines[-1], time.monotonic() - began)

    def _failed(self, step: int, reason: str) -> None:
        """Log the reason, unless it is the same as before; the next save tries again."""
        before, self._reason = self._reason, redact(reason)
        if self._reason != before:
            log.warning(
                "checkpoint %d was not uploaded to %s, the next save tries again: %s", step, self._where, self._reason
            )

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Upload the last checkpoint within LAST_SECONDS, unless a second Ctrl-C asks to stop at once."""
        end = time.monotonic() + (0 if kind is KeyboardInterrupt else LAST_SECONDS)
        if self._wait(end) and self._newest is not None and self._newest[1] != self._sent:
            log.info("uploading the last checkpoint to %s, for %s at most", self._where, format_duration(LAST_SECONDS))
            self._start(max(0.0, end - time.monotonic()))
            self._wait(end)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._reason = "it took too long"
        if self._newest is not None and self._newest[1] != self._sent:
            log.warning("checkpoint %d, the last one, is not at %s: %s", self._newest[1], self._where, self._reason)

    def _wait(self, end: float) -> bool:
        """Wait for the running upload until `end` (time.monotonic); return whether none is running."""
        if self._sender is not None:
            self._sender.join(max(0.0, end - time.monotonic()))
        return self._sender is None or not self._sender.is_alive()


def _communicate(process: subprocess.Popen[str], seconds: float) -> str:
    """Return what a process prints; kill it after `seconds`."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"it took longer than {format_duration(seconds)}"
