"""Send a run's newest checkpoint away while it trains: what a killed session has written may be thrown away.

Beside the data path: `jgpt.train` gives the loop an `Uploads` to call after each save. The sending is done by a process
of its own (`publish.py`), so that it can neither stop nor slow down training, and can be ended when it hangs.
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

from jgpt.kaggle.paths import scratch_dir
from jgpt.kaggle.publish import check_target, copy_tree
from jgpt.redaction import redact
from jgpt.wording import format_duration

MOST_SECONDS = 3600.0  # for one upload while the run trains
LAST_SECONDS = 1200.0  # for what is left to send at the end: on Kaggle an hour is left behind the deadline

log = logging.getLogger("jgpt")


class Uploads:
    """Sends the newest whole checkpoint and the small files of a run to `checkpoint.upload`; nothing where that is "".

    As a context manager it sends the last one at the end, within LAST_SECONDS, also when the run failed.

    Raises UserError at once where nothing could be sent from here.
    """

    def __init__(self, checkpoint: ConfigDict) -> None:
        self._where, self._every_seconds = checkpoint.upload, checkpoint.upload_every_minutes * 60
        if self._where:
            check_target(self._where)
        self._newest: tuple[Path, int] | None = None  # run directory and step that were saved last
        self._sent = -1  # the step that arrived last
        self._due = 0.0  # on time.monotonic()'s clock
        self._reason = ""  # of the failure that was told last
        self._sender: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    def saved(self, run_dir: Path, step: int) -> None:
        """Take note of a whole checkpoint; begin to send it when it is time and nothing else is being sent."""
        if not self._where:
            return
        self._newest = run_dir, step
        if time.monotonic() >= self._due and not (self._sender and self._sender.is_alive()):
            self._begin(MOST_SECONDS)

    def _begin(self, seconds: float) -> None:
        assert self._newest is not None
        run_dir, step = self._newest
        try:
            staged = Path(tempfile.mkdtemp(dir=scratch_dir(), prefix="upload-"))
        except OSError as error:
            return self._failed(step, str(error))
        try:  # here and now: the next save may delete this checkpoint
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
        """Run the process that sends, to its end or for so many seconds."""
        began = time.monotonic()
        command = [sys.executable, "-m", "jgpt.kaggle.publish", str(staged), self._where]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        try:
            # A session of its own: Ctrl-C is meant for the run, which sends its last checkpoint all the same.
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
        log.info("checkpoint %d was sent to %s in %.0f s", step, lines[-1], time.monotonic() - began)

    def _failed(self, step: int, reason: str) -> None:
        """Say why, once for each reason; the next save tries again."""
        before, self._reason = self._reason, redact(reason)
        if self._reason != before:
            log.warning(
                "checkpoint %d was not sent to %s, the next save tries again: %s", step, self._where, self._reason
            )

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Send what is left within LAST_SECONDS, unless the user wants to leave at once."""
        end = time.monotonic() + (0 if kind is KeyboardInterrupt else LAST_SECONDS)
        if self._wait(end) and self._newest is not None and self._newest[1] != self._sent:
            log.info("sending the last checkpoint to %s, for %s at most", self._where, format_duration(LAST_SECONDS))
            self._begin(max(0.0, end - time.monotonic()))
            self._wait(end)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._reason = "it was not done in time"
        if self._newest is not None and self._newest[1] != self._sent:
            log.warning("checkpoint %d, the last one, is not at %s: %s", self._newest[1], self._where, self._reason)

    def _wait(self, end: float) -> bool:
        """Wait for what is being sent, to `end` on the monotonic clock; tell whether nothing is."""
        if self._sender is not None:
            self._sender.join(max(0.0, end - time.monotonic()))
        return self._sender is None or not self._sender.is_alive()


def _communicate(process: subprocess.Popen[str], seconds: float) -> str:
    """Return what a process prints; end it when it takes longer."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"it was not done after {format_duration(seconds)}"
