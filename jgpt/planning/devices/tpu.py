"""TPUs that are not here, to compile for: libtpu describes them, and needs no TPU for it.

Beside the data path: `planning/devices` returns them as a target.
"""

import os
from contextlib import suppress

import jax

from jgpt.errors import UserError

# The name on the command line: the topology as libtpu calls it. Kaggle lends 8 chips, which are one host.
TPU_TARGETS = {"v5e8": "v5e:2x4"}


def tpu_devices(name: str) -> list[jax.Device]:
    """Return the chips of a target. Raises UserError where libtpu is missing, or refuses."""
    set_up_libtpu()
    from jax.experimental import topologies  # loads nothing that training needs

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=TPU_TARGETS[name]).devices)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"--device={name}: libtpu does not describe this TPU here: {reason}. {pip_line()}") from None


def set_up_libtpu() -> None:
    """Find libtpu, and tell it to look for no TPU. Raises UserError where it is not installed."""
    path = None
    with suppress(ImportError):
        import libtpu  # pyright: ignore[reportMissingImports] (an extra: plan-tpu)

        path = libtpu.get_library_path()
    if path is None:
        raise UserError(f"compiling for a TPU needs libtpu, which is not installed. No TPU is needed. {pip_line()}")
    os.environ.setdefault("TPU_LIBRARY_PATH", path)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock is for the chips: two plans may run at once
    # Else it asks Google's cloud, for minutes, which machine this is; and writes its log to the terminal.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def pip_line() -> str:
    """Return the command that installs the libtpu of this JAX (Linux only)."""
    return f'Run: pip install "jax[tpu]=={jax.__version__}"'
