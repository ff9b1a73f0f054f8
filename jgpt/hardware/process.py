"""How this process is set up for JAX: its flags, its caches, its cores.

Beside the data path: the commands call `set_up_process` before anything touches a device.
"""

import glob
import os
import sys
from contextlib import suppress
from pathlib import Path

import jax

from jgpt.errors import UserError
from jgpt.hardware.devices import MEMORY_SHARE
from jgpt.wording import GIB

COMPILED_BYTES = 2 * GIB  # of compiled programs kept on disk; a large model's step takes some tens of MB


def set_up_process(deterministic: bool = False) -> None:
    """Prepare this process for training; call it before JAX touches a device (later calls change nothing).

    `deterministic`: a GPU computes the same bits in every process (config key execution.deterministic). What the user
    has set in the environment or in JAX's own config stays.

    Raises:
        UserError: TensorFlow is loaded in this process.
    """
    if "tensorflow" in sys.modules:
        raise UserError(
            "TensorFlow is imported in this process. JAX must have the devices to itself: beside TensorFlow its "
            "all-reduce between two T4s fails or returns nonsense (jax issue 39167). Start jgpt in a process of its "
            "own, as `python -m jgpt.train`, without the import (keras, tensorflow_datasets and tensorboard import it)."
        )
    # JAX takes 75% of a GPU's memory by default. Setting both names of this variable is an error in JAX.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))
    # NCCL 2.24 and later share host memory through cuMem, which dies with CUDA error 217 on pairs of T4s (NVIDIA/nccl
    # issue 1838); the older shared-memory path works everywhere.
    os.environ.setdefault("NCCL_CUMEM_HOST_ENABLE", "0")
    # 1, errors and warnings, is what JAX itself puts there when it is imported; XLA's warnings are for XLA's authors.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    # Else JAX's CUDA plugin, which is there for plans, looks for cuDNN where there is no GPU, and shows a traceback.
    if not has_nvidia_gpu():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # Else XLA times several algorithms for each product at each start of a process, takes the fastest, and adds up
    # gradients of the embedding in any order: other bits after a restart (measured: docs/benchmarks).
    if deterministic and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    # XLA runs element-wise work on one thread for each CPU device: a device for each core is 1.5 times faster on two.
    already = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue] (JAX adds its options late)
    if already == -1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", usable_cores())
        except RuntimeError:  # the devices are in use: too late, and no harm done
            pass


def has_nvidia_gpu() -> bool:
    """Tell whether the system has an NVIDIA GPU, by its device files; in WSL there is one file for all GPUs."""
    return bool(glob.glob("/dev/nvidia*")) or os.path.exists("/dev/dxg")


def user_cache() -> Path:
    """Return the per-user cache directory, which may not exist yet. It is safe to delete."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jgpt"


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles on disk, so that a resumed run does not compile its step again.

    For accelerators only, so call it once the devices may be touched: XLA refuses most of its own entries for a CPU
    with a page of errors each, or runs into illegal instructions (jax issue 38445). Nothing happens where the user has
    named a directory (JAX_COMPILATION_CACHE_DIR), or the cache directory cannot be written.
    JAX_ENABLE_COMPILATION_CACHE=false switches it off. JAX warns of a damaged entry and compiles again.
    """
    if jax.config.jax_compilation_cache_dir is not None or jax.default_backend() == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        return
    directory = user_cache() / "compiled"
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)


def usable_cores() -> int:
    """Count the CPU cores that this process may run on (a container or `taskset` may leave it fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
