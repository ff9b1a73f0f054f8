"""Several processes of one run: who writes, who waits, and what all of them agree on.

Beside the data path. Each process has its own devices and dispatches the same programs; the arrays travel in XLA's
collectives. Small texts (a choice of process 0, a checksum, "I have ended") go through the key-value store of JAX's
coordination service, which waits with a timeout and does not touch the devices. One process is the usual case: then
everything here returns at once.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # JAX has no public name for its key-value store; Orbax takes it from here, too
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.errors import OutOfMemory, TrainingDiverged, UserError

POLL_SECONDS = 1.0  # between two looks at the others
SILENT_SECONDS = 30.0  # after which a process counts as dead: longer than any pause of Python's threads
LEAVE_SECONDS = 3.0  # that process 0 stays after an error, so that the others read of it: the store is in process 0
EXIT_LOST = 5  # another process of the run has ended
CODES = ((UserError, 2), (OutOfMemory, 3), (TrainingDiverged, 4), (KeyboardInterrupt, 130))
AGAIN = "Start all processes again with the same command: training goes on from the newest checkpoint."

T = TypeVar("T")
_calls = itertools.count()  # of `share` and the like: all processes make the same ones, in the same order


def n_processes() -> int:
    """Return how many processes the run has."""
    return distributed.global_state.num_processes if distributed.global_state.client is not None else 1


def process_id() -> int:
    """Return the number of this process."""
    return distributed.global_state.process_id if distributed.global_state.client is not None else 0


def is_first() -> bool:
    """Tell whether this is process 0, which alone writes logs, metrics and status."""
    return process_id() == 0


def own_devices(devices: list[jax.Device]) -> list[jax.Device]:
    """Return those of the devices that belong to this process."""
    return [device for device in devices if device.process_index == jax.process_index()]


def share(text: str) -> list[str]:
    """Return the text of each process, in their order; waits until all have come here."""
    if n_processes() == 1:
        return [text]
    key = f"jgpt/share/{next(_calls)}"
    _put(f"{key}/{process_id()}", text)
    return [_get(f"{key}/{i}") for i in range(n_processes())]


def first_decides(decide: Callable[[], T]) -> T:
    """Return what `decide` returns in process 0, where alone it is called; a value that JSON can hold."""
    if n_processes() == 1:
        return decide()
    key = f"jgpt/first/{next(_calls)}"
    if is_first():
        value = decide()
        _put(key, json.dumps(value))
        return value
    return json.loads(_get(key))


def first_before_others(work: Callable[[], T]) -> T:
    """Do `work` in process 0, and then in all others: what it leaves on a disk that they share is there for them."""
    done = [work()] if is_first() else []
    first_decides(lambda: None)
    return done[0] if done else work()


def announce(key: str) -> None:
    """Let the others, who wait by `wait_for`, go on; callable in any thread. A key is used once in a run."""
    if n_processes() > 1:
        _put(f"jgpt/{key}", "")


def wait_for(key: str) -> None:
    """Wait until a process has announced `key`; callable in any thread."""
    if n_processes() > 1:
        _get(f"jgpt/{key}")


def check_same(facts: Mapping[str, str], what: str, advice: str) -> None:
    """Raise UserError, in all processes, where `facts` differ between them: it names the process and what differs."""
    everyone = [json.loads(text) for text in share(json.dumps(dict(facts), sort_keys=True))]
    for i, theirs in enumerate(everyone):
        differ = [
            f"{key}: {theirs.get(key, 'nothing')} in process {i}, {everyone[0].get(key, 'nothing')} in process 0"
            for key in sorted(everyone[0] | theirs)
            if theirs.get(key) != everyone[0].get(key)
        ]
        if differ:
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise UserError(
                f"the processes of this run differ in {what}:\n  " + "\n  ".join(differ[:5]) + f"{more}\n{advice}"
            )


class Agreement:
    """What any process asks for, known to all at the same step.

    The wishes of all are gathered over the devices, in the order of the steps, and are read one call later: the host
    never waits for the devices. It costs a collective of `BYTES` a process, which a step hides.
    """

    BYTES = 48

    def __init__(self, devices: list[jax.Device]) -> None:
        self.steps = 2 if n_processes() == 1 else 3  # that may begin before a wish is fulfilled
        self._unread: jax.Array | None = None
        if n_processes() == 1:
            return
        firsts = [next(d for d in devices if d.process_index == i) for i in range(n_processes())]
        mesh = Mesh(np.array(firsts), ("processes",))
        self._each = NamedSharding(mesh, PartitionSpec("processes"))
        self._gather = jax.jit(lambda wishes: wishes, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wish: str) -> str:
        """Ask for `wish`, "" for nothing; return what was asked for at the call before, the same in all processes.

        In one process that is the wish itself. Of several, the one of the first process that had any.
        """
        if n_processes() == 1:
            return wish
        row = np.frombuffer(wish.encode()[: self.BYTES].ljust(self.BYTES), np.uint8)[None]
        unread = self._unread
        self._unread = self._gather(
            jax.make_array_from_process_local_data(self._each, row, (n_processes(), self.BYTES))
        )
        if unread is None:
            return ""
        wishes = [bytes(wish).decode(errors="replace").strip() for wish in np.asarray(unread)]
        return next((wish for wish in wishes if wish), "")

    def forget(self) -> None:
        """Do not hear what is asked for at this moment: it is done."""
        self._unread = None


@contextmanager
def together(on_lost: Callable[[str], None] = lambda reason: None) -> Iterator[None]:
    """Watch the other processes while the block runs, and end this one when one of them has ended before its time.

    What ends the block by an error is told to the others, which end with the same exit code; one that vanishes is
    missed after SILENT_SECONDS. Before this process ends, `on_lost` gets the reason.
    """
    if n_processes() == 1:
        yield
        return
    names = share(f"{platform.node()}, pid {os.getpid()}")
    watch = _Watch(names, on_lost)
    try:
        yield
        share("")  # nobody leaves while others still work
    except BaseException as error:
        watch.leave(error)
        raise
    finally:
        watch.stop()


class _Watch:
    """A thread that says "I am here" every POLL_SECONDS, and looks whether the others do."""

    def __init__(self, names: list[str], on_lost: Callable[[str], None]) -> None:
        self._names, self._on_lost = names, on_lost
        self._run = next(_calls)
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
                _put(f"{ended}{i}", json.dumps({"code": EXIT_LOST, "reason": said_what}))
                self._lost(int(i), EXIT_LOST, said_what)

    def _lost(self, i: int, code: int, reason: str) -> None:
        """End this process, which waits for one that is gone."""
        if self._over.is_set() or i == process_id():
            return
        message = f"process {i} of this run ({self._names[i]}) has ended: {reason}"
        with suppress(Exception):  # a full disk
            self._on_lost(message)
        print(
            f"error: {message}\nThe processes of a run work together, so process {process_id()} ends, too. Look into"
            f" the log of process {i} for more. {AGAIN}",
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
        code = next((code for kind, code in CODES if isinstance(error, kind)), 1)
        text = str(error) if isinstance(error, UserError | OutOfMemory | TrainingDiverged) else repr(error)[:500]
        with suppress(jax.errors.JaxRuntimeError):
            _put(f"jgpt/ended/{self._run}/{process_id()}", json.dumps({"code": code, "reason": text}))
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
            self._lost(0, EXIT_LOST, "JAX has lost the connection to it (see above)")
            os._exit(128 + signal.SIGABRT)

        self._handler = HANDLER(on_abort)  # kept: C has only its address
        _libc_signal(signal.SIGABRT, self._handler)


HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _libc_signal(number: signal.Signals, handler: Any) -> None:
    """Call C's signal(); None is the default, which Python itself has for this signal."""
    ctypes.CDLL(None).signal(ctypes.c_int(number), handler)


def _put(key: str, text: str) -> None:
    client = distributed.global_state.client
    assert client is not None
    client.key_value_set(key, text, allow_overwrite=True)


def _get(key: str) -> str:
    """Wait for a key, however long: whoever should bring it and has ended is missed by the watch."""
    client: Any = distributed.global_state.client
    while True:
        try:
            return client.blocking_key_value_get(key, 2000)  # a signal is heard between two of these
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
