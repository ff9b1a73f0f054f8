"""Start on Kaggle's machine: unpack jgpt, run a command of it as a child process, and record how that ended.

Beside the data path. `laptop/kernel.py` puts the source of this file into the one script that is uploaded, which Kaggle
runs as a notebook of one cell. So it uses only the standard library, no __file__ and no arguments, and it always ends
without an exception, because Kaggle may delete what a failed run has written.
"""

import base64
import collections
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))  # not on Windows
LAST_LINES = 20  # of the child's output, for status.json when the child could not write its own


def kaggle_root() -> Path:
    """Return the folder of input/ and working/: /kaggle, or JGPT_KAGGLE_ROOT in an imitation of the machine."""
    return Path(os.environ.get("JGPT_KAGGLE_ROOT") or "/kaggle")


def scratch_dir() -> Path:
    """Return a folder for files that only this session needs; on Kaggle it is outside the 20 GB that are kept."""
    scratch = kaggle_root() / "temp"
    try:
        scratch.mkdir(exist_ok=True)
    except OSError:  # the root does not exist, or is read-only
        return Path(tempfile.gettempdir())
    return scratch


def start(
    archive: str,
    module: str,
    arguments: list[str],
    *,
    inputs: list[str],
    accelerator: str,
    internet: bool,
    trains: bool,
) -> None:
    """Run `python -m MODULE ARGUMENTS` from `archive` (base85 of a .tar.xz) and return, however that ends.

    `inputs` must be mounted, each is "KIND NAME"; jgpt.train does not start without them. `accelerator` is what was
    asked for, in Kaggle's words. `trains` says that the arguments name a config: its run directory is then
    working/outputs, and its token files are in scratch. An error is recorded in working/outputs/status.json.
    """
    outputs, scratch = kaggle_root() / "working" / "outputs", scratch_dir() / "jgpt"
    if trains:
        arguments = [*arguments, f"--config.out_dir={outputs}"]
        if not any(argument.startswith("--config.data.cache_dir") for argument in arguments):
            arguments.append(f"--config.data.cache_dir={scratch / 'tokens'}")
    child = Child()
    try:
        code = scratch / "code"
        unpack_code(archive, code)
        sys.path.insert(0, str(code))
        from jgpt.redaction import redact  # the only module of jgpt used here: it imports no other

        child.clean = redact
        environment = child_environment(code, scratch, inputs, internet)
        environment["JGPT_KAGGLE_ACCELERATOR"] = accelerator  # machines.py
        with child.forwards_signals():
            child.run([sys.executable, "-m", module, *arguments], code, environment)
            record_end(outputs, child)
            if trains:  # Kaggle's datasets drop folders, so they become tar files
                child.run([sys.executable, "-m", "jgpt.kaggle.session.pack", str(outputs)], code, environment)
    except (Exception, KeyboardInterrupt):
        text = child.clean(traceback.format_exc())
        print(text, file=sys.stderr, flush=True)
        child.lines.extend(text.splitlines())
        record_end(outputs, child)


def unpack_code(archive: str, code: Path) -> None:
    """Unpack the archive into the folder `code`, and delete what was in it before."""
    shutil.rmtree(code, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b85decode("".join(archive.split()))), mode="r:xz") as tar:
        tar.extractall(code, filter="data")


def child_environment(code: Path, scratch: Path, inputs: list[str], internet: bool) -> dict[str, str]:
    """Return the child's environment: our code before installed packages, caches in scratch, the Hub off if offline.

    jgpt itself sets the variables of the devices (hardware/devices.py).
    """
    environment = dict(os.environ)
    paths = [str(code), str(code / "packages"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["JGPT_KAGGLE_INPUTS"] = ",".join(inputs)
    environment["PYTHONUNBUFFERED"] = "1"  # so each line arrives when it is written
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "jax"))
    environment.setdefault("HF_HOME", str(scratch / "huggingface"))
    if not internet:
        environment["HF_HUB_OFFLINE"] = "1"  # else each look at the Hub waits for a connection until it times out
    return environment


class Child:
    """One child process at a time: we print its output line by line, and forward signals to it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self.clean: Callable[[str], str] = str  # hides the secrets in a line
        self._stopped = False  # a signal came while no child ran: start none after it

    def run(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        """Run a command to its end; print both of its streams as one."""
        if self._stopped:
            return
        print("+", " ".join(["python", *command[1:]]), flush=True)
        # In its own process group, so that Ctrl-C in a terminal reaches it only once, through us.
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if self._stopped:
            self.process.terminate()  # the signal came after the check above
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in map(self.clean, output):
                self.lines.append(line.rstrip("\n"))
                print(line, end="", flush=True)
        self.process.wait()

    @contextmanager
    def forwards_signals(self) -> Iterator[None]:
        """Forward SIGTERM, SIGINT and SIGHUP to the child while the block runs (only the main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
        else:
            self._stopped = True


def record_end(outputs: Path, child: Child) -> None:
    """Write status.json for a child that died before it could: the cause, and its last lines of output."""
    path = outputs / "status.json"
    try:
        status = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # none, or only half written
        status = {}
    pid = child.process.pid if child.process else os.getpid()
    code = child.process.returncode if child.process else None
    if status.get("pid") == pid and status.get("state") != "running" and code is not None:
        return  # the child wrote its own end
    status = {"state": "", "step": 0, "total_steps": 0, "reason": "", "resume_command": ""} | status
    status["state"] = "finished" if code == 0 else "failed"
    status["reason"] = "\n".join([describe_end(code), *child.lines]) if code != 0 else "the command ended"
    status |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "pid": pid}
    print(f"{status['state']}: {describe_end(code)}", flush=True)
    temporary = path.with_name(f"status.json.{os.getpid()}-{os.urandom(4).hex()}.tmp")  # as in atomic_write.py
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        text = json.dumps(status, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # as json_text of wording.py
        temporary.replace(path)
    except OSError as error:  # a full disk: the log still has the line above
        print(f"status.json could not be written: {error}", flush=True)
        with suppress(OSError):
            temporary.unlink()


def describe_end(code: int | None) -> str:
    """Describe how a child ended.

    >>> describe_end(-9), describe_end(2), describe_end(None)
    ('killed by signal 9 (SIGKILL)', 'exit code 2', 'it could not be started')
    """
    if code is None:
        return "it could not be started"
    return f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
