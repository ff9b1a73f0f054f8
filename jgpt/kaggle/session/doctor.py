"""Measure Kaggle's machine in about three minutes, and write the results to working/doctor.json.

    python -m jgpt.kaggle.session.doctor [--seconds 60] [--upload dataset:OWNER/SLUG] [--output FILE]

Beside the data path: a planner can calibrate itself with the file. It works on any machine; on a CPU use few --seconds.
It holds no variable's value, only names. Its keys, which do not change:

    time, seconds             the time of the measurement, and --seconds
    versions                  python, packages by name, driver, image (git_commit, build_date); null where absent
    environment               names of the variables that begin with KAGGLE_
    gpus                      nvidia-smi's [name, memory in MiB, power limit in W]
    tpu_chips                 how many are on the PCI bus
    devices                   JAX's [{kind, compute_capability, bytes_for_jax}]
    all_reduce.default, .cumem_off
                              {devices, correct, gb_per_second_by_mib, transport}: over all devices, without and with
                              NCCL_CUMEM_HOST_ENABLE=0 (null on a TPU, which has no NCCL); transport in NCCL's words
                              ("SHM/direct/direct"), or null
    matmul                    FLOP/s: {fp16,fp32}_{first_second, alone, together} (on a TPU bf16 for fp16); size;
                              clocks: by GPU and quantity [least, mean, most] of sm_mhz, watts, celsius during it
    memory_gb_per_second      of each device, read and written
    training                  {tokens_per_second, flops, compute, share_of_matmul, ...} of a small GPT
    disks                     working, scratch, tmp: {total_gb, free_gb, write_mb_per_second}
    internet                  host: whether it was reached
    session                   {token: present or not, account or null, reason, upload: null, "ok" or the error}
    sigterm                   {handler_called, grace_seconds: null, as only the end of a session shows it}

A part that failed is {"error": ...} instead.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jgpt.atomic_write import write_json
from jgpt.errors import UserError
from jgpt.hardware.pci import tpu_chips
from jgpt.kaggle.session import checks
from jgpt.kaggle.session.paths import on_kaggle, scratch_dir, working_dir
from jgpt.kaggle.session.publish import publish
from jgpt.kaggle.session.readings import CLOCKS, clock_summary, in_short, transport, with_share
from jgpt.redaction import redact

PACKAGES = (
    "jgpt", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "libtpu", "flax", "optax", "orbax-checkpoint",
    "tensorstore", "numpy", "ml_collections", "transformers", "tokenizers", "huggingface_hub", "kaggle", "kagglehub",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12",
)  # fmt: skip
HOSTS = ("api.kaggle.com", "huggingface.co", "pypi.org")
PART_SECONDS = 240.0  # more than a part needs: if one hangs, the others are still reported
DISK_TEST_MIB = 128


def examine(seconds: float, upload: str) -> dict[str, Any]:
    """Measure everything; `seconds` is the time for matrix products, and sets the time of the other parts."""
    report: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": seconds}
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "environment": lambda: sorted(name for name in os.environ if name.startswith("KAGGLE_")),
        "gpus": lambda: [line.split(", ") for line in _nvidia_smi("name,memory.total,power.limit")],
        "tpu_chips": tpu_chips,
        "devices": lambda: measure("devices", 0),
        "all_reduce": lambda: {
            "default": all_reduce(seconds / 12, ""),  # empty: NCCL's default. Where it is not set, jgpt sets 0
            "cumem_off": None if tpu_chips() else all_reduce(seconds / 12, "0"),
        },
        "matmul": lambda: matmul(seconds),
        "memory_gb_per_second": lambda: measure("memory", seconds / 12),
        "training": lambda: measure("training", seconds),
        "disks": disks,
        "internet": lambda: {host: _reaches(host) for host in HOSTS},
        "session": lambda: session(upload),
        "sigterm": sigterm,
    }
    for name, part in parts.items():
        try:
            report[name] = part()
        except Exception as error:  # the other parts are still worth reporting
            report[name] = {"error": redact(f"{type(error).__name__}: {error}")[:500]}
        print(f"{name}: {in_short(report[name])}", flush=True)
    report["training"] = with_share(report["training"], report["matmul"])
    if "share_of_matmul" in report["training"]:
        share = report["training"]["share_of_matmul"]
        print(f"a training step reaches {share:.0%} of the speed of matrix products on all devices")
    return report


def measure(part: str, seconds: float, variables: dict[str, str] | None = None) -> Any:
    """Run a part of `measure.py` in its own process, and return its JSON."""
    environment = os.environ | (variables or {})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "jgpt.kaggle.session.measure", part, str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PART_SECONDS + seconds)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, Any]:
    """Return the versions of everything that may change a speed."""
    result: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    result["driver"] = next(iter(_nvidia_smi("driver_version")), None)
    for path in map(Path, checks.IMAGE_FILES):
        result[path.name] = path.read_text().strip() if path.is_file() else None
    return result


def all_reduce(seconds: float, cumem_host: str) -> dict[str, Any]:
    """Measure the all-reduce with this NCCL_CUMEM_HOST_ENABLE, and read in NCCL's log how it moves the data."""
    with tempfile.TemporaryDirectory() as folder:
        log = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl.%p"}
        result = measure("all_reduce", seconds, log | {"NCCL_CUMEM_HOST_ENABLE": cumem_host})
        text = "".join(path.read_text(errors="replace") for path in Path(folder).glob("nccl.*"))
    return result | {"transport": transport(text)}


def matmul(seconds: float) -> dict[str, Any]:
    """Measure matrix products, and during it the clocks, power and temperature of the GPUs."""
    with _clocks() as samples:
        result = measure("matmul", seconds)
    return result | {"clocks": clock_summary(samples)}


@contextmanager
def _clocks() -> Iterator[list[str]]:
    """Let nvidia-smi write a line for each GPU and second during the block; after it they are in the list."""
    lines: list[str] = []
    query = f"--query-gpu=index,{','.join(CLOCKS.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-l", "1"]
    if shutil.which(command[0]) is None:
        yield lines
        return
    with tempfile.TemporaryFile("w+") as file, subprocess.Popen(command, stdout=file) as process:
        try:
            yield lines
        finally:
            process.terminate()
            process.wait()
            file.seek(0)
            lines += file.read().splitlines()


def disks() -> dict[str, Any]:
    """Measure the size and the write speed of each disk."""
    result = {}
    for name, folder in (("working", working_dir()), ("scratch", scratch_dir()), ("tmp", Path(tempfile.gettempdir()))):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            result[name] = {"total_gb": usage.total / 1e9, "free_gb": usage.free / 1e9}
            result[name]["write_mb_per_second"] = _write(folder)
    return result


def _write(folder: Path) -> float:
    """Write a file with fsync: MB/s."""
    block, start = os.urandom(2**20), time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(DISK_TEST_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return DISK_TEST_MIB * 2**20 / 1e6 / (time.monotonic() - start)


def session(upload: str) -> dict[str, Any]:
    """Report whether the session has a token, and whose; with `upload`, whether it may write there."""
    account = checks.whoami()
    known = account.state == "ok"
    result: dict[str, Any] = {"token": Path(os.environ.get("KAGGLE_API_V1_TOKEN", "")).is_file()}
    result |= {"account": account.value if known else None, "reason": "" if known else account.value, "upload": None}
    if upload:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "doctor.txt").write_text("A test of jgpt's doctor: you can delete it.\n")
            try:
                publish(Path(folder), upload, "a test of jgpt's doctor")
                result["upload"] = "ok"
            except UserError as error:
                result["upload"] = str(error)
    return result


def sigterm() -> dict[str, Any]:
    """Test whether a process can catch SIGTERM; only the end of a session shows how much time it then has."""
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        called = process.wait(10) == 7
    return {"handler_called": called, "grace_seconds": None}


def _nvidia_smi(query: str) -> list[str]:
    """Return the lines of nvidia-smi, one for each GPU; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _reaches(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Examine the machine, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for matrix products; the rest takes two minutes")
    parser.add_argument("--upload", default="", help="also upload a small file there, to test the permission")
    parser.add_argument("--output", type=Path, default=(working_dir() if on_kaggle() else Path()) / "doctor.json")
    options = parser.parse_args(arguments)
    report = examine(options.seconds, options.upload)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, report)
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
