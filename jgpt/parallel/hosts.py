"""Several processes of one run: who writes, who waits, and what all of them agree on.

Beside the data path. Each process has its own devices and dispatches the same programs; the arrays travel in XLA's
collectives. Small texts (a choice of process 0, a checksum, "I have ended") go through the key-value store of JAX's
coordination service, which waits with a timeout and does not touch the devices. One process is the usual case: then
everything here returns at once.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # JAX has no public name for its key-value store; Orbax takes it from here, too
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.errors import UserError

T = TypeVar("T")
calls = itertools.count()  # of what all processes call in the same order


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


def gather_texts(text: str) -> list[str]:
    """Return the text of each process, in their order; waits until all have come here."""
    if n_processes() == 1:
        return [text]
    key = f"jgpt/texts/{next(calls)}"
    put_text(f"{key}/{process_id()}", text)
    return [get_text(f"{key}/{i}") for i in range(n_processes())]


def barrier() -> None:
    """Wait until all processes have come here."""
    gather_texts("")


def first_decides(decide: Callable[[], T]) -> T:
    """Return what `decide` returns in process 0, where alone it is called; a value that JSON can hold."""
    if n_processes() == 1:
        return decide()
    key = f"jgpt/first/{next(calls)}"
    if is_first():
        value = decide()
        put_text(key, json.dumps(value))
        return value
    return json.loads(get_text(key))


def first_before_others(work: Callable[[], T]) -> T:
    """Do `work` in process 0, and then in all others: what it leaves on a disk that they share is there for them."""
    done = [work()] if is_first() else []
    first_decides(lambda: None)
    return done[0] if done else work()


def check_same(facts: Mapping[str, str], what: str, advice: str) -> None:
    """Raise UserError, in all processes, where `facts` differ between them: it names the process and what differs."""
    everyone = [json.loads(text) for text in gather_texts(json.dumps(dict(facts), sort_keys=True))]
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


def connect(devices: list[jax.Device]) -> None:
    """Let the devices of all processes find each other, now that no process is behind.

    They do so at the first collective, and XLA gives up where one of them comes late: gloo after 30 seconds. The first
    collective of training comes after a long compile, which takes as long in no two processes.
    """
    if n_processes() == 1:
        return
    barrier()
    for group in (devices, _firsts(devices)):
        mesh = Mesh(np.array(group), ("devices",))
        each, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["devices"], []))
        ones = jax.make_array_from_callback((len(group),), each, np.ones(len(group), np.int32).__getitem__)
        assert int(jax.jit(jnp.sum, out_shardings=same)(ones)) == len(group)


def _firsts(devices: list[jax.Device]) -> list[jax.Device]:
    """Return the first device of each process."""
    return [next(d for d in devices if d.process_index == i) for i in range(n_processes())]


def comes_from_others(error: BaseException) -> bool:
    """Tell whether an error is that of a collective or a barrier, which fails where another process has died."""
    if isinstance(error, TimeoutError) and error.__cause__ is not None:  # Orbax's, of a barrier
        error = error.__cause__
    # jax 0.7 raises ValueError where an array is read that a collective did not bring.
    read = isinstance(error, ValueError) and re.search("gloo|nccl|coordination", str(error), re.IGNORECASE)
    return n_processes() > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or bool(read))


class Agreement:
    """What any process asks for, known to all at the same step.

    The wishes of all are gathered over the devices, in the order of the steps, and are read one call later: the host
    never waits for the devices. It costs one collective a step, of `BYTES` a process, dispatched behind the step.
    """

    BYTES = 48

    def __init__(self, devices: list[jax.Device]) -> None:
        self.steps = 2 if n_processes() == 1 else 3  # that may begin before a wish is fulfilled
        self._unread: jax.Array | None = None
        if n_processes() == 1:
            return
        mesh = Mesh(np.array(_firsts(devices)), ("processes",))
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
        """Drop the wish that was gathered last: it has been fulfilled."""
        self._unread = None


def put_text(key: str, text: str) -> None:
    """Keep a text under a key, for all processes; another one under the same key is replaced."""
    client = distributed.global_state.client
    assert client is not None
    client.key_value_set(key, text, allow_overwrite=True)


def get_text(key: str) -> str:
    """Wait for a key, without a limit: if the process that should write it has ended, the watch ends this one."""
    client: Any = distributed.global_state.client
    while True:
        try:
            return client.blocking_key_value_get(key, 2000)  # a signal is heard between two of these
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
