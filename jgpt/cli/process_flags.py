"""The flags of a run of several processes, which train and evaluate share: where the others are.

Beside the data path. One process is the default.
"""

import os

from absl import flags


def define_processes() -> None:
    """Define where process 0 is, how many processes there are, and which of them this is."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, in a run of several processes (docs/distributed.md)"
    )
    flags.DEFINE_integer(
        "num_processes", None, "how many processes; without it one, or as many as a cluster says", 1, 100_000
    )
    flags.DEFINE_integer("process_id", None, "which of the processes this is, from 0 on", 0, 99_999)
    flags.DEFINE_integer(
        "coordinator_timeout_seconds", 300, "how long the processes wait for each other at the start", 1, 86_400
    )


def join_processes() -> None:
    """Connect this process with the others of its run, where there are any; before JAX touches a device."""
    from jgpt.cli.run import only_errors
    from jgpt.hardware.cluster import find_place, join  # here: --help must not wait for JAX
    from jgpt.parallel.hosts import is_first

    args = flags.FLAGS
    place = find_place(args.coordinator_address, args.num_processes, args.process_id, os.environ)
    if place is not None:
        join(place, args.coordinator_timeout_seconds)
        if not is_first():
            only_errors()
