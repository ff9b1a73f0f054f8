"""Which processes make up a run, and how this one joins them.

Beside the data path: the commands train and evaluate ask here before anything touches a device. JAX connects the
processes (`jax.distributed`), and finds them by itself under Slurm, Open MPI, Kubernetes and on Cloud TPU. One process
is the default, and costs a look at the environment.
"""

import glob
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import jax

from jgpt.errors import EXIT_USER, UserError
from jgpt.wording import format_duration

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what JAX reads
TPU_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
HEARTBEAT_SECONDS = 100  # after which JAX itself ends the processes; `parallel/watch.py` is faster, and says why
log = logging.getLogger("jgpt")


class Place(NamedTuple):
    """The place of this process in a run of several. What is None is found by JAX, in the cluster it runs in."""

    coordinator: str | None  # HOST:PORT of process 0
    n_processes: int | None
    process_id: int | None
    local_devices: list[int] | None = None  # the GPUs that it takes; None: JAX's own choice


def find_place(
    coordinator: str | None, n_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> Place | None:
    """Return the place of this process, None where it is alone. Raises UserError.

    The three values are those of the flags; the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
    stand in for those that are None, and a cluster for what is then still missing.

    >>> find_place("10.0.0.1:1234", 2, 1, {})
    Place(coordinator='10.0.0.1:1234', n_processes=2, process_id=1, local_devices=None)
    >>> find_place(None, None, None, {})
    """
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS") or None
    n_processes = _number("JAX_NUM_PROCESSES", environment) if n_processes is None else n_processes
    process_id = _number("JAX_PROCESS_ID", environment) if process_id is None else process_id
    place = Place(coordinator, n_processes, process_id)
    if n_processes == 1 and not process_id:
        return None
    if None not in place[:3]:
        _check(place)
        return place
    in_cluster = _place_in_cluster(environment)
    if in_cluster is not None:
        return in_cluster._replace(**{k: v for k, v in place._asdict().items() if v is not None})
    given = {"coordinator_address": coordinator, "num_processes": n_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    there = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    raise UserError(
        f"{there} without {' and '.join(missing)}. A run of several processes needs all three, and each"
        " process a process_id of its own from 0 on; leave out all of them for one process. Set"
        f" {' '.join(f'--{name}=...' for name in missing)}, or the environment variables JAX_COORDINATOR_ADDRESS,"
        " JAX_NUM_PROCESSES and JAX_PROCESS_ID."
    )


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}. Allowed: a whole number from 0 on. Set it so.")
    return int(text) if text else None


def _check(place: Place) -> None:
    """Raise UserError where the three values cannot be."""
    coordinator, n, i = place[:3]
    assert coordinator is not None and n is not None and i is not None
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not port or not 0 < int(port[1]) < 65536:
        raise UserError(
            f"coordinator_address={coordinator!r}. Allowed: HOST:PORT, the same for all processes, with a free port of"
            " the machine of process 0. For example: --coordinator_address=10.0.0.1:12345"
        )
    if n < 1 or not 0 <= i < n:
        raise UserError(
            f"num_processes={n} and process_id={i}. Allowed: one process or more, and each a process_id of its own from"
            f" 0 to {max(1, n) - 1}."
        )


def _place_in_cluster(environment: Mapping[str, str]) -> Place | None:
    """Return what is known of this process where a cluster has started several; None where it is alone."""
    found = Place(None, None, None)
    if all(name in environment for name in SLURM):
        # SLURM_NTASKS is of the job: a step in it, or a shell, may have one task.
        n = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
        return found._replace(n_processes=n, local_devices=_gpus_of_node(environment)) if n > 1 else None
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return found
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes"):
            return found
        log.warning(
            "this is pod %s of an indexed Job, and trains alone: JAX finds the other pods with the package kubernetes"
            " (pip install kubernetes), or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
            environment["JOB_COMPLETION_INDEX"],
        )
    return found if _is_one_of_tpu_hosts(environment) else None


def _gpus_of_node(environment: Mapping[str, str]) -> list[int] | None:
    """Return all GPUs of a node where Slurm runs one process on it: JAX would take the first one only."""
    per_node, gpus = environment.get("SLURM_STEP_TASKS_PER_NODE", ""), environment.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if re.fullmatch(r"1(\(x\d+\))?", per_node) and gpus.isdecimal() else None


def _is_one_of_tpu_hosts(environment: Mapping[str, str]) -> bool:
    """Tell whether this is one of several hosts of a Cloud TPU; asks Google's metadata server on TPU machines alone."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if names is not None:
        return "," in names
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    if not chips or "TPU_SKIP_MDS_QUERY" in environment or not importlib.util.find_spec("libtpu"):
        return False
    import urllib.request  # here, where alone it is needed

    request = urllib.request.Request(TPU_METADATA, headers={"Metadata-Flavor": "Google"})
    with suppress(OSError):  # no such server: another cloud's machine
        with urllib.request.urlopen(request, timeout=2) as answer:
            return b"," in answer.read()
    return False


def join(place: Place, timeout_seconds: int) -> None:
    """Connect this process with the others of the run, and wait for them; call it before JAX touches a device.

    Ends the process with exit code 2 and a message where they are not there after `timeout_seconds`: JAX would abort.
    Raises UserError where the address cannot be used.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # on CPUs; GPUs have NCCL, TPUs their own
    waiting = threading.Timer(timeout_seconds, _give_up, (place, timeout_seconds))
    waiting.daemon = True
    waiting.start()
    try:
        with _own_signals():
            jax.distributed.initialize(
                coordinator_address=place.coordinator,
                num_processes=place.n_processes,
                process_id=place.process_id,
                local_device_ids=place.local_devices,
                initialization_timeout=timeout_seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise UserError(
            f"the processes of this run could not be connected at {place.coordinator or 'the address JAX found'}:"
            f" {reason}. The address must be of the machine of process 0, with a port that is free there, and the same"
            " for all processes. Set another --coordinator_address=HOST:PORT, or end what uses the port."
        ) from error
    finally:
        waiting.cancel()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Let Ctrl-C end the wait at once, and take SIGTERM back from JAX, which catches it for its preemption notices."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(place: Place, seconds: int) -> None:
    """End the process: JAX waits in C++, where no exception reaches it."""
    where = place.coordinator or "the address that JAX found"
    waited = format_duration(seconds)
    if place.process_id == 0:
        said = f"not all {place.n_processes} processes of this run came to {where} within {waited}"
    else:
        said = (
            f"the coordinator of this run, process 0 at {where}, does not answer for {waited}{_try(place.coordinator)}"
        )
    print(
        f"error: {said}. All processes must be started, with the same coordinator_address, which each of their machines"
        " can reach (a firewall may block it), and the same num_processes. Look into the logs of the others, then start"
        " all of them again; --coordinator_timeout_seconds=N waits longer.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(EXIT_USER)


def _try(coordinator: str | None) -> str:
    """Say whether anything answers at an address."""
    if coordinator is None:
        return ""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError as error:
        return f" ({error.strerror or error})"
    return " (something listens there; is it the right port, and did all processes start?)"
