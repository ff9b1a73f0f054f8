"""One process of a run watches the others, and ends when one of them has ended before its time.

Beside the data path. JAX notices as well, after its own heartbeats, but then it aborts the process: no line of Python
runs any more, and nobody learns which process it was. So each process says here that it is alive, in the key-value
store of JAX's coordination service, and ends with a message before JAX aborts it.
"""

import ctypes
import itertools
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
from jax._src import distributed

from jgpt.errors import EXIT_LOST, OutOfMemory, TrainingDiverged, UserError, exit_code
from jgpt.parallel.hosts import (
    barrier,
    calls,
    comes_from_others,
    gather_texts,
    is_first,
    n_processes,
    process_id,
    put_text,
)
from jgpt.redaction import redact

POLL_SECONDS = 1.0  # between two looks at the others
SILENT_SECONDS = 30.0  # after which a process counts as dead: longer than any pause of Python's threads
LEAVE_SECONDS = 3.0  # that process 0 stays after an error, so that the others read of it: the store is in process 0
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)  # of a signal, in C
AGAIN = "Start all processes again with the same command: training goes on from the newest checkpoint."


@contextmanager
def together(on_lost: Callable[[str], None] = lambda reason: None) -> Iterator[None]:
    """Watch the other processes while the block runs, and end this one when one of them has ended before its time.

    An error that ends the block is sent to the others, which end with the same exit code. A process that was killed
    sends nothing: it counts as dead after SILENT_SECONDS. A collective mostly fails because another process was killed,
    so this process first waits that long to learn which one. `on_lost` gets the reason before this process ends.
    """
    if n_processes() == 1:
        yield
        return
    names = gather_texts(f"{platform.node()}, pid {os.getpid()}")
    watch = _Watch(names, on_lost)
    try:
        yield
        barrier()  # nobody leaves while others still work
    except BaseException as error:
        if comes_from_others(error):  # such as "Gloo AllGather failed"
            time.sleep(SILENT_SECONDS + 3 * POLL_SECONDS)  # until the watch has found who is gone, which ends this
        watch.leave(error)
        raise
    finally:
        watch.stop()


def _libc_signal(number: signal.Signals, handler: Any) -> None:
    """Call C's signal(); None is the default, which Python itself has for this signal."""
    ctypes.CDLL(None).signal(ctypes.c_int(number), handler)


class _Watch:
    """A thread that says "I am here" every POLL_SECONDS, and looks whether the others do."""

    def __init__(self, names: list[str], on_lost: Callable[[str], None]) -> None:
        self._names, self._on_lost = names, on_lost
        self._run = next(calls)
        self._over = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}  # by key: what a process last said, and since when
        self._catch_abort()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        ended, alive = f"jgpt/ended/{self._run}/", f"jgpt/alive/{self._run}/"
        client = distributed.global_state.client
        assert client is not None
        for beat in itertools.count():
            try:
                client.key_value_set(f"{alive}{process_id()}", str(beat), allow_overwrite=True)
                for key, text in client.key_value_dir_get(ended):
                    self._lost(int(key.rpartition("/")[2]), **json.loads(text))
                if is_first():
                    self._look_for_silent(client.key_value_dir_get(alive), ended)
            except jax.errors.JaxRuntimeError:
                self._lost(0, EXIT_LOST, "it does not answer any more")
            if self._over.wait(POLL_SECONDS):
                return

    def _look_for_silent(self, said: list[tuple[str, str]], ended: str) -> None:
        """Tell all processes where one of them was silent too long."""
        now = time.monotonic()
        self._heard |= {key: (beat, now) for key, beat in said if self._heard.get(key, ("", 0))[0] != beat}
        for key, (_, since) in self._heard.items():
            if now - since > SILENT_SECONDS:
                i, said_what = key.rpartition("/")[2], f"it was silent for {SILENT_SECONDS:.0f} s"
                put_text(f"{ended}{i}", json.dumps({"code": EXIT_LOST, "reason": said_what}))
                self._lost(int(i), EXIT_LOST, said_what)

    def _lost(self, i: int, code: int, reason: str) -> None:
        """End this process, which waits for one that is gone, unless it is leaving by itself."""
        if not self._over.is_set() and i != process_id():
            self._end(i, code, reason)

    def _end(self, i: int, code: int, reason: str) -> NoReturn:
        message = redact(f"process {i} of this run ({self._names[i]}) has ended: {reason}")
        with suppress(Exception):  # a full disk
            self._on_lost(message)
        again = AGAIN if code == EXIT_LOST else ""  # an error's own message says what to change
        print(
            f"error: {message}\nThe processes of a run work together, so process {process_id()} ends, too. Look into"
            f" the log of process {i} for more. {again}".rstrip(),
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.stdout.flush()
        if is_first():
            time.sleep(LEAVE_SECONDS)
        os._exit(code)

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends by `error`."""
        if self._over.is_set():
            return
        self._over.set()
        text = str(error) if isinstance(error, UserError | OutOfMemory | TrainingDiverged) else repr(error)[:500]
        with suppress(jax.errors.JaxRuntimeError):
            put_text(f"jgpt/ended/{self._run}/{process_id()}", json.dumps({"code": exit_code(error), "reason": text}))
            if is_first():
                time.sleep(LEAVE_SECONDS)

    def stop(self) -> None:
        """Watch no longer: the block is over."""
        self._over.set()
        if self._handler is not None:
            _libc_signal(signal.SIGABRT, None)

    def _catch_abort(self) -> None:
        """Say what has happened where JAX aborts this process, which it does at once when process 0 has gone.

        JAX prints a page from C++, and calls abort(). Python's own handlers run too late for that: this one is C's.
        """
        self._handler = None
        if sys.platform == "win32":
            return

        def on_abort(_: int) -> None:
            if is_first():  # an error of XLA's own
                os._exit(128 + signal.SIGABRT)
            self._end(0, EXIT_LOST, "JAX has lost the connection to it (see above)")

        self._handler = HANDLER(on_abort)  # kept: C has only its address
        _libc_signal(signal.SIGABRT, self._handler)
