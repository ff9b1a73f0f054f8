"""What this machine is: cores, memory, disk, connection, secrets, devices, and how fast they are.

Beside the data path: `jgpt.check_env` prints it. What a machine of a known kind has beside this is a `KnownMachine`.
"""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax

from jgpt.checks import tpu
from jgpt.checks.software import software
from jgpt.checks.verdict import Check
from jgpt.errors import UserError
from jgpt.hardware import devices, pci, process, speed
from jgpt.wording import GIB

SECRETS = (
    "HF_TOKEN",
    "KAGGLE_API_TOKEN",
    "KAGGLE_KEY",
    "KAGGLE_API_V1_TOKEN",
    "KAGGLE_USER_SECRETS_TOKEN",
    "WANDB_API_KEY",
)


class KnownMachine(Protocol):
    """The checks that a machine of a known kind has of its own; a module is one. `online` is None where not tried."""

    def machine(self, online: bool | None) -> list[Check]:
        """Check what is special in this machine, the connection included."""
        ...

    def secrets(self, online: bool | None) -> list[Check]:
        """Check the secrets that this machine keeps."""
        ...

    def accelerators(self, kinds: Sequence[str]) -> list[Check]:
        """Check that the accelerators that JAX sees are those that this machine should have."""
        ...


def check_all(run_dir: Path, quick: bool, place: KnownMachine | None = None) -> dict[str, list[Check]]:
    """Run every check; `quick` leaves out the ones that take seconds. `place` is what this machine has of its own."""
    sections = {"Software": software(), "Machine": [*cores(), *memory(), *disk(run_dir)], "Secrets": secrets()}
    online = None if quick else has_internet()
    if place is not None:
        sections["Machine"] += place.machine(online)
        sections["Secrets"] += place.secrets(online)
    elif online is not None:
        sections["Machine"] += internet(online)
    with contextlib.suppress(UserError):  # TensorFlow, which software() names
        process.set_up_process()
    try:
        found = devices.local_devices()
    except RuntimeError as error:
        install = tpu.install() if pci.tpu_chips() else 'pip install "jax[cuda12]"'
        fix = "unset JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else install
        return sections | {"Devices": [Check("JAX", "FAIL", str(error).splitlines()[0], fix)]}
    if pci.tpu_chips():
        sections["Software"].append(tpu.libtpu())
    sections["Devices"] = [*describe(found), *accelerators(found, gpus_in_machine(), place)]
    if not quick:
        sections["Speed"] = [*matmul_speed(found[0]), *all_reduce_speed(found)]
    return sections


def cores() -> list[Check]:
    """Count the CPU cores."""
    usable, present = process.usable_cores(), os.cpu_count()
    return [Check("CPU cores", "ok", f"{usable}" if usable == present else f"{usable} of {present}")]


def memory() -> list[Check]:
    """Read the main memory, in total and free; a container's limit counts."""
    if Path("/proc/meminfo").exists():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    else:  # macOS does not say what is free
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            total = min(total, int(Path(limit).read_text()))
    available = min(total, available)
    value = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available < 2 * GIB:
        return [Check("RAM", "warn", value, "close other programs: compiling a step takes about 2 GiB")]
    return [Check("RAM", "ok", value)]


def disk(run_dir: Path) -> list[Check]:
    """Check the disk that the run directory is on, or would be."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    value = f"{free / GIB:.1f} GiB free at {folder}"
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        return [Check("disk", "FAIL", f"cannot write to {folder}", "name another place: --run_dir DIR")]
    if free < 5 * GIB:
        fix = "free some, or name another place: a checkpoint of GPT-2 124M takes 1.5 GB, and three are kept"
        return [Check("disk", "warn", value, fix)]
    return [Check("disk", "ok", value)]


def has_internet() -> bool:
    """Try to reach the Hugging Face Hub, for three seconds at most."""

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection(("huggingface.co", 443), timeout=3).close()
            reached.set()

    reached = threading.Event()
    thread = threading.Thread(target=connect, daemon=True)  # looking up the name has no time limit
    thread.start()
    thread.join(3)
    return reached.is_set()


def internet(online: bool) -> list[Check]:
    """Say whether there is a connection; training itself needs none."""
    if online:
        return [Check("internet", "ok", "yes")]
    return [Check("internet", "-", "no (needed only to fetch models and packages)")]


def secrets() -> list[Check]:
    """Say which secrets are set in the environment, and never what they are."""
    return [Check(name, "ok", "set") if os.environ.get(name) else Check(name, "-", "not set") for name in SECRETS]


def describe(found: Sequence[jax.Device]) -> list[Check]:
    """Name each device: kind, compute capability, memory that JAX may take."""
    checks = []
    for device in found:
        chip = devices.chip_of(device)
        parts = [device.device_kind]
        if chip.compute_capability:
            parts.append("sm_{}{}".format(*chip.compute_capability))
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit:
            parts.append(f"{limit / GIB:.1f} GiB {'of HBM ' if device.platform == 'tpu' else ''}for JAX")
        checks.append(Check(f"device {device.id}", "ok", ", ".join(parts)))
    return checks


def gpus_in_machine() -> list[str]:
    """Name the NVIDIA GPUs that the driver knows, whatever JAX sees."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return ["NVIDIA GPU"] * len(glob.glob("/dev/nvidia[0-9]*"))


def accelerators(found: Sequence[jax.Device], gpus: Sequence[str], place: KnownMachine | None = None) -> list[Check]:
    """Check that JAX sees all the `gpus` in the machine and, in a known `place`, that they are those it should have."""
    kinds = [device.device_kind for device in found if device.platform != "cpu"]
    if (chips := pci.tpu_chips()) and (checks := tpu.chips(kinds, chips)):
        return checks
    if gpus and not kinds:
        value = f"{len(gpus)} in the machine ({gpus[0]}), none seen by JAX"
        if os.environ.get("JAX_PLATFORMS"):
            return [Check("GPUs", "warn", value, f"unset JAX_PLATFORMS (it is {os.environ['JAX_PLATFORMS']})")]
        return [Check("GPUs", "FAIL", value, 'pip install "jax[cuda12]"')]
    if len(kinds) < len(gpus):
        return [Check("GPUs", "warn", f"JAX sees {len(kinds)} of {len(gpus)}", "unset CUDA_VISIBLE_DEVICES")]
    if place is not None:
        return place.accelerators(kinds)
    if found[0].platform == "tpu":
        return [Check(tpu.CHIPS, "ok", f"{len(kinds)}")]
    return [Check("GPUs", "ok", f"{len(kinds)}") if kinds else Check("GPUs", "-", "none: training runs on the CPU")]


def matmul_speed(device: jax.Device) -> list[Check]:
    """Measure the matrix product in each precision, and warn where bf16 is not the hardware's own."""
    size = 1024 if device.platform == "cpu" else 8192
    capability, peaks = devices.compute_capability(device), devices.chip_of(device).peak_flops
    measured, on_tpu = {}, device.platform == "tpu"
    for dtype, jax_dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")):
        if dtype == "fp16" and on_tpu:
            continue  # its matrix unit has none
        try:
            measured[dtype] = speed.matmul_flops(device, jax_dtype, size, seconds=0.5)
        except RuntimeError as error:
            fix = tpu.ONE_PROCESS if on_tpu else "nvidia-smi shows who else uses the GPU"
            return [Check(f"{dtype} matmul", "FAIL", str(error).splitlines()[0], fix)]
    checks = []
    for dtype, flops in measured.items():
        value, peak = f"{flops / 1e12:.3g} TFLOP/s", peaks[dtype]
        if peak:
            value += f", {flops / peak:.0%} of the peak"
        if dtype == "bf16" and capability and capability < (8, 0):
            value += f". bf16 is emulated below sm_80: fp16 is {measured['fp16'] / flops:.1f} times as fast here"
            checks.append(Check("bf16 matmul", "warn", value, "--config.precision.compute=auto (it takes fp16 here)"))
        else:
            checks.append(Check(f"{dtype} matmul", "ok", value))
    return checks


def all_reduce_speed(found: Sequence[jax.Device]) -> list[Check]:
    """Sum a buffer over the devices: whether the sum is right, and how fast."""
    if len(found) < 2:
        return []
    fix = (
        "start a new session: this TPU is damaged"
        if found[0].platform == "tpu"
        else "try NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0 python -m jgpt.check_env; one device needs no all-reduce: "
        "CUDA_VISIBLE_DEVICES=0"
    )
    name = f"all-reduce over {len(found)}"
    n_bytes = (4 if found[0].platform == "cpu" else 64) * 2**20
    try:
        rate, correct = speed.all_reduce_bandwidth(found, n_bytes, seconds=0.5)
    except RuntimeError as error:
        return [Check(name, "FAIL", str(error).splitlines()[0], fix)]
    if not correct:
        return [Check(name, "FAIL", "the sum is wrong, or not the same on every device", fix)]
    return [Check(name, "ok", f"{rate / 1e9:.3g} GB/s")]
