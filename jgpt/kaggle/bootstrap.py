"""What runs first on Kaggle's machine: jgpt unpacked, a command of it run as a child, its end written down.

Beside the data path. `kernel.py` puts the source of this file into the one script that is uploaded, which Kaggle runs
as a notebook of one cell: so it needs the standard library alone, no __file__ and no arguments, and it ends without an
exception whatever happens, because Kaggle may throw away what a failed run has written.
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
from contextlib import contextmanager
from pathlib import Path

LAST_LINES = 20  # of the child's output, kept for status.json when it dies without a word


def kaggle_root() -> Path:
    """Return the folder that holds input/ and working/: /kaggle, or JGPT_KAGGLE_ROOT where the machine is imitated."""
    return Path(os.environ.get("JGPT_KAGGLE_ROOT") or "/kaggle")


def scratch_dir() -> Path:
    """Return a folder for what need not outlive the session; on Kaggle it is outside the 20 GB that are kept."""
    scratch = kaggle_root() / "temp"
    try:
        scratch.mkdir(exist_ok=True)
    except OSError:  # there is no such root, or it cannot be written
        return Path(tempfile.gettempdir())
    return scratch


def start(archive: str, module: str, arguments: list[str], *, inputs: list[str], internet: bool, trains: bool) -> None:
    """Run `python -m MODULE ARGUMENTS` from `archive` (base64 of a .tar.xz) and return, however that ends.

    `inputs` are what must be mounted, each as "KIND NAME"; jgpt.train refuses to begin without them. `trains` says that
    the arguments name a config: its run directory is then working/outputs, and its token files are in scratch. What
    went wrong is in working/outputs/status.json.
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
        from jgpt.redaction import redact  # the one part of jgpt that is used here: it needs nothing else

        child.clean = redact
        environment = child_environment(code, scratch, inputs, internet)
        with child.takes_signals():
            child.run([sys.executable, "-m", module, *arguments], code, environment)
            record_end(outputs, child)
            if trains:  # few flat files survive what Kaggle's datasets do to folders
                child.run([sys.executable, "-m", "jgpt.kaggle.pack", str(outputs)], code, environment)
    except (Exception, KeyboardInterrupt):
        text = child.clean(traceback.format_exc())
        print(text, file=sys.stderr, flush=True)
        child.lines.extend(text.splitlines())
        record_end(outputs, child)


def unpack_code(archive: str, code: Path) -> None:
    """Unpack the archive into the folder `code`, which holds nothing else then."""
    shutil.rmtree(code, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive)), mode="r:xz") as tar:
        tar.extractall(code, filter="data")


def child_environment(code: Path, scratch: Path, inputs: list[str], internet: bool) -> dict[str, str]:
    """Return the child's environment: our code before what is installed, caches in scratch, the Hub as it can be had.

    What concerns the devices jgpt sets by itself (hardware/devices.py).
    """
    environment = dict(os.environ)
    paths = [str(code), str(code / "packages"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["JGPT_KAGGLE_INPUTS"] = ",".join(inputs)
    environment["PYTHONUNBUFFERED"] = "1"  # lines arrive when they are written
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(scratch / "jax"))
    environment.setdefault("HF_HOME", str(scratch / "huggingface"))
    if not internet:
        environment["HF_HUB_OFFLINE"] = "1"  # or each look at the Hub waits for a connection that never comes
    return environment


class Child:
    """One child process at a time: its output passed on line by line, and our SIGTERM and SIGINT with it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self.clean: Callable[[str], str] = str  # what hides the secrets in a line
        self._stopped = False  # a signal came while there was no child: none is started any more

    def run(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        """Run a command to its end; both of its streams are printed as one."""
        if self._stopped:
            return
        print("+", " ".join(["python", *command[1:]]), flush=True)
        # A session of its own: Ctrl-C in a terminal reaches it once, from here, and not a second time by itself.
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if self._stopped:
            self.process.terminate()  # it came between the question above and here
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in map(self.clean, output):
                self.lines.append(line.rstrip("\n"))
                print(line, end="", flush=True)
        self.process.wait()

    @contextmanager
    def takes_signals(self) -> Iterator[None]:
        """Forward SIGTERM and SIGINT to the child while the block runs (only the main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
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
    """Write status.json for a child that died before it could: why, and the last lines that it wrote."""
    path = outputs / "status.json"
    try:
        status = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # none, or a torn one
        status = {}
    pid = child.process.pid if child.process else os.getpid()
    code = child.process.returncode if child.process else None
    if status.get("pid") == pid and status.get("state") != "running" and code is not None:
        return  # its own word
    status = {"state": "", "step": 0, "total_steps": 0, "reason": "", "resume_command": ""} | status
    status["state"] = "finished" if code == 0 else "failed"
    status["reason"] = "\n".join([describe_end(code), *child.lines]) if code != 0 else "the command ended"
    status |= {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "pid": pid}
    print(f"{status['state']}: {describe_end(code)}", flush=True)
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("status.json.tmp")
        temporary.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:  # a full disk: the log has it all the same
        print(f"status.json could not be written: {error}", flush=True)


def describe_end(code: int | None) -> str:
    """Say how a child ended.

    >>> describe_end(-9), describe_end(2), describe_end(None)
    ('killed by signal 9 (SIGKILL)', 'exit code 2', 'it could not be started')
    """
    if code is None:
        return "it could not be started"
    return f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
