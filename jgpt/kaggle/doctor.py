"""Measure what is known of Kaggle's machine by hearsay alone, in about three minutes, and write working/doctor.json.

    python -m jgpt.kaggle.doctor [--seconds 60] [--upload dataset:OWNER/SLUG] [--output FILE]

Beside the data path: a later planner calibrates itself with the file. It works anywhere; on a CPU take few --seconds.
No variable's value is in it, only names. Its keys, which stay:

    time, seconds             when this was, and what --seconds was
    versions                  python, packages by name, driver, image (git_commit, build_date); null where absent
    environment               names of the variables that begin with KAGGLE_
    gpus                      nvidia-smi's [name, memory in MiB, power limit in W]
    devices                   JAX's [{kind, compute_capability, bytes_for_jax}]
    all_reduce.default, .cumem_off
                              {devices, correct, gb_per_second_by_mib, transport}: over all devices, without and with
                              NCCL_CUMEM_HOST_ENABLE=0; transport as NCCL says it ("SHM/direct/direct"), or null
    matmul                    FLOP/s: {fp16,fp32}_{first_second, alone, together}; size; clocks: by GPU and quantity
                              [least, mean, most] of sm_mhz, watts, celsius meanwhile
    memory_gb_per_second      of each device, read and written
    training                  {tokens_per_second, flops, compute, share_of_matmul, ...} of a small GPT
    disks                     working, scratch, tmp: {total_gb, free_gb, write_mb_per_second}
    internet                  host: whether it was reached
    session                   {token: present or not, account or null, reason, upload: null, "ok" or why not}
    sigterm                   {handler_called, grace_seconds: null as it can be seen only at a session's end}

A part that failed is {"error": ...} in its place.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
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

from jgpt.errors import UserError
from jgpt.kaggle import checks
from jgpt.kaggle.paths import on_kaggle, scratch_dir, working_dir
from jgpt.kaggle.publish import publish
from jgpt.redaction import redact
from jgpt.run_dir.identity import write_json

PACKAGES = (
    "jgpt", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "flax", "optax", "orbax-checkpoint", "tensorstore",
    "numpy", "ml_collections", "transformers", "tokenizers", "huggingface_hub", "kaggle", "kagglehub",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12",
)  # fmt: skip
HOSTS = ("api.kaggle.com", "huggingface.co", "pypi.org")
PART_SECONDS = 240.0  # more than a part needs: one that hangs shall not cost the report
CLOCKS = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}
DISK_TEST_MIB = 128


def examine(seconds: float, upload: str) -> dict[str, Any]:
    """Measure everything; `seconds` go into matrix products, and the other parts take their share of it."""
    report: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": seconds}
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "environment": lambda: sorted(name for name in os.environ if name.startswith("KAGGLE_")),
        "gpus": lambda: [line.split(", ") for line in _nvidia_smi("name,memory.total,power.limit")],
        "devices": lambda: measure("devices", 0),
        "all_reduce": lambda: {
            "default": all_reduce(seconds / 12, ""),  # an empty value is NCCL's default; unset, jgpt sets 0
            "cumem_off": all_reduce(seconds / 12, "0"),
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
        except Exception as error:  # a report with one hole is worth more than none
            report[name] = {"error": redact(f"{type(error).__name__}: {error}")[:500]}
        print(f"{name}: {in_short(report[name])}", flush=True)
    report["training"] = with_share(report["training"], report["matmul"])
    if "share_of_matmul" in report["training"]:
        print(f"a training step reaches {report['training']['share_of_matmul']:.0%} of what its devices can multiply")
    return report


def in_short(value: Any) -> str:
    """Put a part of the report in a line, numbers rounded.

    >>> in_short({"flops": [2.4e13, 2.3123e13], "correct": True})
    'flops 2.4e+13 2.31e+13, correct True'
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(in_short(item) for item in value) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def measure(part: str, seconds: float, variables: dict[str, str] | None = None) -> Any:
    """Run a part of `measure.py` in a process of its own, and return its JSON."""
    environment = os.environ | (variables or {})
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "jgpt.kaggle.measure", part, str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PART_SECONDS + seconds)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, Any]:
    """Return the versions of everything that a speed may depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["driver"] = next(iter(_nvidia_smi("driver_version")), None)
    for path in map(Path, checks.IMAGE_FILES):
        found[path.name] = path.read_text().strip() if path.is_file() else None
    return found


def all_reduce(seconds: float, cumem_host: str) -> dict[str, Any]:
    """Measure the all-reduce with that NCCL_CUMEM_HOST_ENABLE, and read from NCCL's log how it moves the data."""
    with tempfile.TemporaryDirectory() as folder:
        log = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/nccl.%p"}
        found = measure("all_reduce", seconds, log | {"NCCL_CUMEM_HOST_ENABLE": cumem_host})
        text = "".join(path.read_text(errors="replace") for path in Path(folder).glob("nccl.*"))
    return found | {"transport": transport(text)}


def transport(log: str) -> str | None:
    """Find in NCCL's log what its channels go through.

    >>> transport("host:7:9 [0] NCCL INFO Channel 00/0 : 0[40] -> 1[50] via SHM/direct/direct")
    'SHM/direct/direct'
    """
    return ", ".join(sorted(set(re.findall(r"Channel .* via (\S+)", log)))) or None


def matmul(seconds: float) -> dict[str, Any]:
    """Measure matrix products, and the clocks, the power and the heat of the GPUs meanwhile."""
    with _clocks() as samples:
        found = measure("matmul", seconds)
    return found | {"clocks": summary(samples)}


@contextmanager
def _clocks() -> Iterator[list[str]]:
    """Let nvidia-smi write a line for each GPU and second while the block runs; they are in the list after it."""
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


def summary(lines: list[str]) -> dict[str, Any]:
    """Return least, mean and most of each quantity by GPU.

    >>> summary(["0, 585, 30.1, 40", "0, 1590, 69.9, 60"])
    {'0': {'sm_mhz': [585.0, 1087.5, 1590.0], 'watts': [30.1, 50.0, 69.9], 'celsius': [40.0, 50.0, 60.0]}}
    """
    by_gpu: dict[str, list[list[float]]] = {}
    for line in lines:
        gpu, *values = line.split(", ")
        if all(re.fullmatch(r"[\d.]+", value) for value in values):  # not "[N/A]"
            by_gpu.setdefault(gpu, []).append([float(value) for value in values])
    return {
        gpu: {
            name: [min(column), sum(column) / len(column), max(column)]
            for name, column in zip(CLOCKS, zip(*rows, strict=True), strict=True)
        }
        for gpu, rows in by_gpu.items()
    }


def with_share(training: dict[str, Any], matmul: dict[str, Any]) -> dict[str, Any]:
    """Say which share of what all devices multiply together the training step reaches."""
    together = matmul.get(f"{training.get('compute')}_together")
    return training | {"share_of_matmul": training["flops"] / sum(together)} if together else training


def disks() -> dict[str, Any]:
    """Measure the size of each disk, and how fast it is written."""
    found = {}
    for name, folder in (("working", working_dir()), ("scratch", scratch_dir()), ("tmp", Path(tempfile.gettempdir()))):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            found[name] = {"total_gb": usage.total / 1e9, "free_gb": usage.free / 1e9}
            found[name]["write_mb_per_second"] = _write(folder)
    return found


def _write(folder: Path) -> float:
    """Write a file through to the disk: MB/s."""
    block, began = os.urandom(2**20), time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(DISK_TEST_MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return DISK_TEST_MIB * 2**20 / 1e6 / (time.monotonic() - began)


def session(upload: str) -> dict[str, Any]:
    """Say whether the session's token is there and whose it is; with `upload`, whether it may write."""
    account = checks.whoami()
    known = account.state == "ok"
    found: dict[str, Any] = {"token": Path(os.environ.get("KAGGLE_API_V1_TOKEN", "")).is_file()}
    found |= {"account": account.value if known else None, "reason": "" if known else account.value, "upload": None}
    if upload:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "doctor.txt").write_text("A test of jgpt's doctor: it may be removed.\n")
            try:
                publish(Path(folder), upload, "a test of jgpt's doctor")
                found["upload"] = "ok"
            except UserError as error:
                found["upload"] = str(error)
    return found


def sigterm() -> dict[str, Any]:
    """Try whether a process here may catch SIGTERM; how long it then has shows only at a session's end."""
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        called = process.wait(10) == 7
    return {"handler_called": called, "grace_seconds": None}


def _nvidia_smi(query: str) -> list[str]:
    """Return what nvidia-smi says, a line for each GPU; none where there is no driver."""
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
    parser.add_argument("--seconds", type=float, default=60.0, help="of matrix products; the rest takes two minutes")
    parser.add_argument("--upload", default="", help="also send a small file there, to see whether it may be written")
    parser.add_argument("--output", type=Path, default=(working_dir() if on_kaggle() else Path()) / "doctor.json")
    options = parser.parse_args(arguments)
    report = examine(options.seconds, options.upload)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, report)
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
