import glob
import json
import os
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest

from jgpt.checks import machine, verdict
from jgpt.checks import software as checks
from jgpt.checks.verdict import Check
from jgpt.hardware import process, speed
from jgpt.kaggle.session import checks as kaggle_checks

ROOT = Path(__file__).parents[2]


def fake_gpu(kind: str, capability: str = "7.5", number: int = 0) -> Any:
    memory = {"bytes_limit": int(13.4 * 2**30)}
    return SimpleNamespace(
        id=number, device_kind=kind, compute_capability=capability, platform="gpu", memory_stats=lambda: memory
    )


P100 = fake_gpu("Tesla P100-PCIE-16GB", "6.0")
T4S = [fake_gpu("Tesla T4", number=0), fake_gpu("Tesla T4", number=1)]


@pytest.fixture
def no_gpu_in_machine(monkeypatch):
    monkeypatch.setattr(machine, "gpus_in_machine", lambda: [])
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def versions(monkeypatch):
    """Pretend that some packages have another version, or (None) are absent."""
    pretended: dict[str, str | None] = {}
    real = metadata.version

    def version(package: str) -> str:
        found = pretended[package] if package in pretended else real(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return pretended


def named(found: list[Check], name: str) -> Check:
    return next(check for check in found if check.name == name)


# Software


def test_this_environment_holds_all_that_jgpt_needs():
    found = checks.software()
    assert {check.state for check in found} == {"ok"}
    assert {"Python", "jax", "jaxlib", "flax", "orbax-checkpoint", "ml_collections", "matplotlib", "tensorstore"} <= {
        check.name for check in found
    }
    assert len(found) == len({check.name for check in found})


def test_package_missing_too_old_or_optional(versions):
    versions |= {"flax": "0.11.1", "optax": None, "pyarrow": None}
    found = checks.packages()
    assert named(found, "flax") == Check("flax", "FAIL", "0.11.1 (>=0.11.2)", 'pip install "flax>=0.11.2"')
    assert named(found, "optax") == Check("optax", "FAIL", "not installed (>=0.2.8)", 'pip install "optax>=0.2.8"')
    assert named(found, "pyarrow")[1:3] == ("-", "not installed (>=15); optional: reads .parquet text")


def test_jaxlib_of_another_release_than_jax(versions):
    versions["jaxlib"] = "99.0"
    assert named(checks.packages(), "jaxlib").state == "FAIL"


def test_cuda_plugin_of_another_version_than_jaxlib(versions):
    versions |= {"jax": "0.7.2", "jaxlib": "0.7.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.7.2"}
    plugin, pjrt = checks.cuda_plugin()
    assert plugin.state == "FAIL" and "0.10.2 beside jaxlib 0.7.2" in plugin.value
    assert plugin.fix == 'pip install "jax[cuda12]==0.7.2"'
    assert pjrt == Check("jax-cuda12-pjrt", "ok", "0.7.2")


def test_requirements_come_from_the_installed_package_or_the_checkout(monkeypatch, tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared["requires-python"] == ">={}.{}".format(*checks.MIN_PYTHON)
    monkeypatch.setattr(checks, "_requires", lambda package: None)
    assert {check.name for check in checks.packages()} >= {"jax", "tqdm", "zstandard"}  # from pyproject.toml
    monkeypatch.setattr(checks, "JGPT_FOLDER", tmp_path)
    (check,) = checks.packages()
    assert check.state == "warn" and "pip install" in check.fix
    monkeypatch.setattr(checks, "_requires", lambda package: ["jax>=99"] if package == "jgpt" else None)
    assert named(checks.packages(), "jax").state == "FAIL"


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    assert checks.python()[0].state == "FAIL"


def test_tensorflow_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    assert checks.tensorflow()[0].state == "FAIL"


# Machine


def test_cores_and_memory_are_this_machines(monkeypatch):
    assert machine.cores()[0].value.split()[0] == str(len(os.sched_getaffinity(0)))
    (ram,) = machine.memory()
    available, total = float(ram.value.split()[0]), float(ram.value.split()[-1])
    assert 0 < available <= total
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as on macOS
    assert machine.memory()[0].value.split()[-1] == f"{total:.1f}"


def test_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB")
    assert machine.memory()[0][1:3] == ("warn", "1.0 GiB free of 4.0")


def test_disk_of_a_directory_that_is_yet_to_be_made(tmp_path, monkeypatch):
    assert str(tmp_path) in machine.disk(tmp_path / "runs" / "first")[0].value
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    assert machine.disk(tmp_path)[0].state == "warn"
    (tmp_path / "file").touch()
    assert machine.disk(tmp_path / "file")[0].state == "FAIL"
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root may write anywhere
    assert machine.disk(tmp_path)[0] == Check(
        "disk", "FAIL", f"cannot write to {tmp_path}", "name another place: --run_dir DIR"
    )


def test_internet(offline, monkeypatch):
    assert machine.internet(machine.has_internet())[0].value.startswith("no")
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: SimpleNamespace(close=lambda: None))
    assert machine.internet(machine.has_internet()) == [Check("internet", "ok", "yes")]


# Devices


def test_devices_are_described():
    assert machine.describe(T4S)[1] == Check("device 1", "ok", "Tesla T4, sm_75, 13.4 GiB for JAX")
    assert [check.value for check in machine.describe(jax.local_devices())] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("seen", "gpus", "on_kaggle", "state", "words"),
    [
        ([], [], False, "-", "runs on the CPU"),
        (T4S, ["Tesla T4"] * 2, False, "ok", "2"),
        (T4S, ["Tesla T4"] * 2, True, "ok", "both T4s"),
        (T4S[:1], ["Tesla T4"], True, "warn", "one T4 of the two"),
        (T4S[:1], ["Tesla T4"] * 2, True, "warn", "1 of 2"),
        ([P100], ["Tesla P100-PCIE-16GB"], True, "warn", "Tesla P100-PCIE-16GB, not Kaggle's two T4s"),
        ([], [], True, "warn", "none, not Kaggle's two T4s"),
        ([], ["Tesla T4"] * 2, True, "FAIL", "2 in the machine (Tesla T4), none seen by JAX"),
    ],
)
def test_accelerators(seen, gpus, on_kaggle, state, words, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    (check,) = machine.accelerators(seen or jax.local_devices(), gpus, kaggle_checks if on_kaggle else None)
    assert check.state == state
    assert words in check.value
    assert bool(check.fix) == (state in ("warn", "FAIL"))
    if on_kaggle and len(gpus) < 2:
        assert '"machine_shape": "NvidiaTeslaT4"' in check.fix
    if state == "FAIL":
        assert check.fix == 'pip install "jax[cuda12]"'


def test_gpus_hidden_on_purpose_are_a_warning(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (check,) = machine.accelerators(jax.local_devices(), ["Tesla T4"])
    assert (check.state, check.fix) == ("warn", "unset JAX_PLATFORMS (it is cpu)")


def test_gpus_in_the_machine_are_found_without_jax(monkeypatch):
    def nvidia_smi(*_: object, **__: object) -> Any:
        return SimpleNamespace(stdout="Tesla T4\nTesla T4\n")

    def absent(*_: object, **__: object) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    assert machine.gpus_in_machine() == ["Tesla T4", "Tesla T4"]
    monkeypatch.setattr(subprocess, "run", absent)
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert machine.gpus_in_machine() == ["NVIDIA GPU"]


def test_devices_that_jax_cannot_start(no_gpu_in_machine, monkeypatch, tmp_path):
    def fail() -> None:
        raise RuntimeError("Unknown backend cuda\nmore")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    sections = machine.check_all(tmp_path, quick=True)
    assert sections["Devices"] == [Check("JAX", "FAIL", "Unknown backend cuda", "unset JAX_PLATFORMS")]
    assert verdict.exit_code(sections) == 2


# Speed


def test_speeds_are_measured():
    assert speed.matmul_flops(jax.local_devices()[1], "float32", size=64, seconds=0.01) > 1e6
    rate, correct = speed.all_reduce_bandwidth(jax.local_devices(), n_bytes=2**16, seconds=0.01)
    assert rate > 1e5
    assert correct


def test_an_all_reduce_that_is_wrong_is_noticed(monkeypatch):
    real = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **options: real(lambda x: f(x) + 1, **options))
    assert speed.all_reduce_bandwidth(jax.local_devices(), n_bytes=2**10, seconds=0.001)[1] is False


def test_matmul_speed_of_a_t4_warns_about_bf16(monkeypatch):
    measured = {"float16": 24e12, "bfloat16": 4e12, "float32": 6e12}
    monkeypatch.setattr(speed, "matmul_flops", lambda device, dtype, size, seconds: measured[dtype])
    fp16, bf16, fp32 = machine.matmul_speed(T4S[0])
    assert fp16 == Check("fp16 matmul", "ok", "24 TFLOP/s, 37% of the peak")
    assert bf16.state == "warn" and "emulated below sm_80: fp16 is 6.0 times as fast" in bf16.value
    assert fp32.state == "ok"
    assert machine.matmul_speed(jax.local_devices()[0])[1] == Check("bf16 matmul", "ok", "4 TFLOP/s")


def test_all_reduce_over_two_devices_one_and_broken_ones(monkeypatch):
    def nccl_error(*_: object, **__: object) -> None:
        raise RuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: invalid argument\nmore")

    assert machine.all_reduce_speed(T4S[:1]) == []
    monkeypatch.setattr(speed, "all_reduce_bandwidth", lambda found, n_bytes, seconds: (3.2e9, True))
    assert machine.all_reduce_speed(T4S) == [Check("all-reduce over 2", "ok", "3.2 GB/s")]
    monkeypatch.setattr(speed, "all_reduce_bandwidth", lambda found, n_bytes, seconds: (3.2e9, False))
    assert machine.all_reduce_speed(T4S)[0].state == "FAIL"
    monkeypatch.setattr(speed, "all_reduce_bandwidth", nccl_error)
    (check,) = machine.all_reduce_speed(T4S)
    assert check.state == "FAIL" and check.value.endswith("invalid argument") and "NCCL_P2P_DISABLE=1" in check.fix
    monkeypatch.setattr(speed, "matmul_flops", nccl_error)
    assert machine.matmul_speed(T4S[0])[0].state == "FAIL"


# The report


def test_whole_report(no_gpu_in_machine, offline, tmp_path):
    sections = machine.check_all(tmp_path, quick=False)
    assert list(sections) == ["Software", "Machine", "Secrets", "Devices", "Speed"]
    assert [check.name for check in sections["Speed"]] == [
        "fp16 matmul",
        "bf16 matmul",
        "fp32 matmul",
        "all-reduce over 2",
    ]
    assert verdict.exit_code(sections) == 0


def test_text_and_json_tell_the_same():
    sections = {"One": [Check("a", "ok", "1"), Check("long name", "warn", "2", "do this")]}
    assert verdict.to_text(sections).splitlines() == [
        "One",
        "  ok    a          1",
        "  warn  long name  2",
        "                   -> do this",
        "",
        "Training can work here: 0 to fix, 1 to know.",
    ]
    assert json.loads(verdict.to_json(sections)) == {
        "ok": True,
        "one": [
            {"name": "a", "state": "ok", "value": "1", "fix": ""},
            {"name": "long name", "state": "warn", "value": "2", "fix": "do this"},
        ],
    }
    sections["Two"] = [Check("b", "FAIL", "3", "do that")]
    assert verdict.to_text(sections).endswith("Training cannot work here yet: 1 to fix, 1 to know.")
    assert verdict.exit_code(sections) == 2


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_command_never_shows_a_secret(arguments, tmp_path):
    secrets = {name: f"planted-{name}-value" for name in machine.SECRETS[:-1]}
    environment = {k: v for k, v in os.environ.items() if k not in machine.SECRETS}
    done = subprocess.run(
        [sys.executable, "-m", "jgpt.check_env", "--quick", f"--run_dir={tmp_path}", *arguments],
        env=environment | secrets | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "planted" not in done.stdout + done.stderr
    if arguments:
        shown = {check["name"]: check["value"] for check in json.loads(done.stdout)["secrets"]}
    else:
        shown = {line.split()[1]: line.split(maxsplit=2)[2] for line in done.stdout.splitlines() if "set" in line}
    assert shown == dict.fromkeys(secrets, "set") | {"WANDB_API_KEY": "not set"}


@pytest.mark.parametrize("package", ["jax", "absl"])
def test_command_still_reports_when_a_package_cannot_be_imported(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('{package} is broken here')")
    done = subprocess.run(
        [sys.executable, "-m", "jgpt", "check-env", "--json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"{package} is broken here" in done.stdout and json.loads(done.stdout)["ok"] is False
    assert not done.stderr


def test_what_is_merely_absent_is_not_ok(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert named(machine.secrets(), "WANDB_API_KEY") == Check("WANDB_API_KEY", "-", "not set")
    assert named(machine.secrets(), "HF_TOKEN").state == "ok"
    assert machine.internet(False)[0].state == "-"
    text = verdict.to_text({"One": [Check("GPUs", "-", "none"), Check("a", "ok", "b")]})
    assert "  -     GPUs  none" in text and "0 to fix, 0 to know" in text


def test_the_wheels_for_plans_raise_no_false_alarm_where_there_is_no_gpu(monkeypatch):
    """JAX's CUDA plugin would look for cuDNN, and log a traceback; where there is a GPU nothing is silenced."""
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", raising=False)
    monkeypatch.setattr(process, "has_nvidia_gpu", lambda: True)
    process.set_up_process()
    assert "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ
    monkeypatch.undo()
    pytest.importorskip("jax_plugins.xla_cuda12")
    if process.has_nvidia_gpu():
        pytest.skip("there is a GPU")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "jgpt.check_env", "--quick", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr == "" and json.loads(done.stdout)["devices"][0]["value"] == "cpu"
