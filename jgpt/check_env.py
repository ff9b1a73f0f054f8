"""Say whether training can work on this machine, how fast, what is missing, and the command that mends it.

    python -m jgpt.check_env [--run_dir DIR] [--json] [--quick]

Exit code 0: training can work (warnings allowed); 2: something must be mended first. No secret's value is ever shown.

Beside the data path: ask here first on a new machine.
"""

import contextlib
import glob
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from jgpt.checks import software as checks
from jgpt.checks import verdict
from jgpt.checks.verdict import Check
from jgpt.wording import GIB

try:
    import jax
    from absl import flags

    from jgpt.cli.run import run
    from jgpt.errors import UserError
    from jgpt.hardware import devices, process, speed
    from jgpt.kaggle.session import checks as kaggle
    from jgpt.kaggle.session.paths import on_kaggle
    from jgpt.redaction import redact
except (ImportError, RuntimeError) as error:  # RuntimeError: jax beside a jaxlib that does not fit it
    if __name__ != "__main__":
        raise
    broken = {"Software": [*checks.software(), Check("imports", "FAIL", str(error), "mend the packages above")]}
    print((verdict.as_json if "--json" in sys.argv else verdict.as_text)(broken))
    sys.exit(verdict.exit_code(broken))


SECRETS = (
    "HF_TOKEN",
    "KAGGLE_API_TOKEN",
    "KAGGLE_KEY",
    "KAGGLE_API_V1_TOKEN",
    "KAGGLE_USER_SECRETS_TOKEN",
    "WANDB_API_KEY",
)


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process and other commands have --run_dir."""
    flags.DEFINE_string("run_dir", ".", "where a run would write: its disk is checked")
    flags.DEFINE_bool("json", False, "print one JSON object")
    flags.DEFINE_bool("quick", False, "leave out the measurements of speed and the connection")


def main() -> int:
    """Check, print, and return the exit code."""
    sections = check_all(Path(flags.FLAGS.run_dir), flags.FLAGS.quick)
    print(redact(verdict.as_json(sections) if flags.FLAGS.json else verdict.as_text(sections)))
    return verdict.exit_code(sections)


def check_all(run_dir: Path, quick: bool) -> dict[str, list[Check]]:
    """Run every check; `quick` leaves out the ones that take seconds."""
    sections = {"Software": checks.software(), "Machine": [*cores(), *memory(), *disk(run_dir)], "Secrets": secrets()}
    online = None if quick else has_internet()
    if on_kaggle():
        sections["Machine"] += kaggle.machine(online)
        sections["Secrets"] += kaggle.secrets(online)
    elif online is not None:
        sections["Machine"] += internet(online)
    with contextlib.suppress(UserError):  # TensorFlow: told above
        process.set_up_process()
    try:
        found = jax.local_devices()
    except RuntimeError as error:
        fix = "unset JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else 'pip install "jax[cuda12]"'
        return sections | {"Devices": [Check("JAX", "FAIL", str(error).splitlines()[0], fix)]}
    sections["Devices"] = [*describe(found), *accelerators(found, gpus_in_machine(), on_kaggle())]
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
    thread = threading.Thread(target=connect, daemon=True)  # looking the name up knows no time limit
    thread.start()
    thread.join(3)
    return reached.is_set()


def internet(online: bool) -> list[Check]:
    """Say whether there is a connection; training itself needs none."""
    return [Check("internet", "ok", "yes" if online else "no (needed only to fetch models and packages)")]


def secrets() -> list[Check]:
    """Say which secrets are set in the environment, and never what they are."""
    return [Check(name, "ok", "set" if os.environ.get(name) else "not set") for name in SECRETS]


def describe(found: Sequence[jax.Device]) -> list[Check]:
    """Name each device: kind, compute capability, memory that JAX may take."""
    told = []
    for device in found:
        chip = devices.describe(device)
        parts = [device.device_kind]
        if chip.compute_capability:
            parts.append("sm_{}{}".format(*chip.compute_capability))
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit:
            parts.append(f"{limit / GIB:.1f} GiB for JAX")
        told.append(Check(f"device {device.id}", "ok", ", ".join(parts)))
    return told


def gpus_in_machine() -> list[str]:
    """Name the NVIDIA GPUs that the driver knows, whatever JAX sees."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return ["NVIDIA GPU"] * len(glob.glob("/dev/nvidia[0-9]*"))


def accelerators(found: Sequence[jax.Device], gpus: Sequence[str], there: bool) -> list[Check]:
    """Check that JAX sees all the `gpus` in the machine and, where it is Kaggle's (`there`), that they are two T4s."""
    kinds = [device.device_kind for device in found if device.platform != "cpu"]
    if gpus and not kinds:
        told = f"{len(gpus)} in the machine ({gpus[0]}), none seen by JAX"
        if os.environ.get("JAX_PLATFORMS"):
            return [Check("GPUs", "warn", told, f"unset JAX_PLATFORMS (it is {os.environ['JAX_PLATFORMS']})")]
        return [Check("GPUs", "FAIL", told, 'pip install "jax[cuda12]"')]
    if len(kinds) < len(gpus):
        return [Check("GPUs", "warn", f"JAX sees {len(kinds)} of {len(gpus)}", "unset CUDA_VISIBLE_DEVICES")]
    if there:
        return kaggle.accelerators(kinds)
    return [Check("GPUs", "ok", f"{len(kinds)}" if kinds else "none: training runs on the CPU")]


def matmul_speed(device: jax.Device) -> list[Check]:
    """Measure the matrix product in each precision, and warn where bf16 is not the hardware's own."""
    size = 1024 if device.platform == "cpu" else 8192
    capability, peaks = devices.compute_capability(device), devices.describe(device).peak_flops
    measured = {}
    for dtype, jax_dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")):
        try:
            measured[dtype] = speed.matmul_flops(device, jax_dtype, size, seconds=0.5)
        except RuntimeError as error:
            fix = "nvidia-smi shows who else uses the GPU"
            return [Check(f"{dtype} matmul", "FAIL", str(error).splitlines()[0], fix)]
    told = []
    for dtype, flops in measured.items():
        value, peak = f"{flops / 1e12:.3g} TFLOP/s", peaks[dtype]
        if peak:
            value += f", {flops / peak:.0%} of the peak"
        if dtype == "bf16" and capability and capability < (8, 0):
            value += f". bf16 is emulated below sm_80: fp16 is {measured['fp16'] / flops:.1f} times as fast here"
            told.append(Check("bf16 matmul", "warn", value, "--config.precision.compute=auto (it takes fp16 here)"))
        else:
            told.append(Check(f"{dtype} matmul", "ok", value))
    return told


def all_reduce_speed(found: Sequence[jax.Device]) -> list[Check]:
    """Sum a buffer over the devices: whether the sum is right, and how fast."""
    if len(found) < 2:
        return []
    fix = (
        "try NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0 python -m jgpt.check_env; one device needs no all-reduce: "
        "CUDA_VISIBLE_DEVICES=0"
    )
    name = f"all-reduce over {len(found)}"
    n_bytes = (4 if found[0].platform == "cpu" else 64) * 2**20
    try:
        rate, correct = speed.all_reduce_bandwidth(found, n_bytes, seconds=0.5)
    except RuntimeError as error:
        return [Check(name, "FAIL", str(error).splitlines()[0], fix)]
    if not correct:
        return [Check(name, "FAIL", "the devices disagree on the sum, or have it wrong", fix)]
    return [Check(name, "ok", f"{rate / 1e9:.3g} GB/s")]


if __name__ == "__main__":
    define_flags()
    run(main, __doc__ or "")
