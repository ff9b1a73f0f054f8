"""The doctor, for real on this machine's CPU, and its parts where the machine must be imitated."""

import json
import os
import sys
from pathlib import Path

import jax
import pytest
from fake_kaggle import KAGGLE_TOKEN, FakeKaggle, server  # noqa: F401
from ml_collections import ConfigDict

from jgpt.kaggle.session import doctor, measure

small_gpt = measure._small_gpt

# ruff: noqa: F811 (tests name the fixtures that they import)


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(doctor, "_reaches", lambda host: False)
    return tmp_path


def smaller(folder: str, on_cpu: bool) -> ConfigDict:
    """Return the doctor's small GPT, smaller still."""
    config = small_gpt(folder, on_cpu)
    config.model.update({"n_layers": 1, "d_model": 16, "context_length": 16})
    config.batch.global_batch_size, config.execution.micro_batch_size = 4, 2
    return config


def test_the_whole_report(kaggle: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Each part for real, in this process; that each has a process of its own is tested below."""
    monkeypatch.setattr(doctor, "measure", lambda part, seconds, variables=None: measure.PARTS[part](seconds))
    monkeypatch.setattr(doctor, "DISK_TEST_MIB", 1)
    monkeypatch.setattr(measure, "_small_gpt", smaller)
    for name, value in {"KAGGLE_KEY": "planted-0123456789", "KAGGLE_USERNAME": "planted-user", "HOME": kaggle}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(doctor.checks, "whoami", lambda: doctor.checks.Check("Kaggle account", "warn", "unknown"))
    with jax.numpy_rank_promotion("allow"):  # as a user's process has it
        assert doctor.main(["--seconds", "0.1"]) == 0
    report = json.loads((kaggle / "working" / "doctor.json").read_text())
    assert not [name for name, part in report.items() if isinstance(part, dict) and "error" in part], report
    assert report["versions"]["jax"] and "KAGGLE_KEY" in report["environment"]
    assert len(report["devices"]) == 2 and report["devices"][0]["kind"] == "cpu"
    for name in ("default", "cumem_off"):
        assert report["all_reduce"][name]["correct"] and report["all_reduce"][name]["transport"] is None
    for name in ("fp16_alone", "fp16_together", "fp32_alone", "fp32_together"):
        assert len(report["matmul"][name]) == 2 and min(report["matmul"][name]) > 0
    assert min(report["memory_gb_per_second"]) > 0
    assert report["training"]["share_of_matmul"] > 0 and report["training"]["steps"] == 12
    assert set(report["disks"]) == {"working", "scratch", "tmp"}
    assert report["sigterm"] == {"handler_called": True, "grace_seconds": None}
    shown = capsys.readouterr()
    assert "planted" not in shown.out + shown.err + json.dumps(report) and "written: " in shown.out


def test_a_part_that_fails_leaves_a_hole(kaggle: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(part: str, seconds: float, variables: object = None) -> None:
        raise RuntimeError(f"{part} cannot be measured")

    monkeypatch.setattr(doctor, "measure", fail)
    monkeypatch.setattr(doctor.checks, "whoami", lambda: doctor.checks.Check("Kaggle account", "ok", "me"))
    assert doctor.main(["--seconds", "1"]) == 0
    report = json.loads((kaggle / "working" / "doctor.json").read_text())
    assert report["matmul"] == report["training"] | {"error": "RuntimeError: matmul cannot be measured"}
    assert report["session"] == {"token": False, "account": "me", "reason": "", "upload": None}
    assert set(report) == set("time seconds versions environment gpus tpu_chips devices all_reduce matmul "
        "memory_gb_per_second training disks internet session sigterm".split())  # fmt: skip
    assert all(
        f"    {name}" in (doctor.__doc__ or "") for name in report if name not in ("time", "seconds", "all_reduce")
    )


def test_each_part_has_a_process_of_its_own_and_says_why_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert doctor.measure("devices", 0, {"JAX_NUM_CPU_DEVICES": "3"})[2]["kind"] == "cpu"
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho \"KeyError: '$3'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="KeyError: 'no_such_part'"):
        doctor.measure("no_such_part", 1)


def test_nvidia_smi_is_asked_for_gpus_and_watched(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    tool = kaggle / "nvidia-smi"
    os.mkfifo(kaggle / "written")
    watching = f'case "$*" in *-l*) echo now >{kaggle}/written; exec sleep 60;; esac'
    tool.write_text(f"#!/bin/sh\necho '0, 1590, 69.5, 70'\necho '1, 585, [N/A], 40'\n{watching}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{kaggle}:{os.environ['PATH']}")

    def measured(part: str, seconds: float) -> dict:
        (kaggle / "written").read_text()  # waits until the tool has written its lines
        return {"fp16_alone": [1.0]}

    monkeypatch.setattr(doctor, "measure", measured)
    clocks = {"0": {"sm_mhz": [1590.0] * 3, "watts": [69.5] * 3, "celsius": [70.0] * 3}}
    assert doctor.matmul(1) == {"fp16_alone": [1.0], "clocks": clocks}
    assert doctor._nvidia_smi("name")[0] == "0, 1590, 69.5, 70"


def test_transport_is_read_from_nccls_log(monkeypatch: pytest.MonkeyPatch):
    def measured(part: str, seconds: float, variables: dict[str, str]) -> dict:
        assert variables["NCCL_CUMEM_HOST_ENABLE"] == "0"
        line = "h:1:2 [0] NCCL INFO Channel 0{}/0 : {}[0] -> {}[1] via SHM/direct/direct\n"
        for pid in (0, 1):
            Path(variables["NCCL_DEBUG_FILE"].replace("%p", str(pid))).write_text(line.format(pid, pid, 1 - pid))
        return {"correct": True}

    monkeypatch.setattr(doctor, "measure", measured)
    assert doctor.all_reduce(1, "0") == {"correct": True, "transport": "SHM/direct/direct"}


def test_uploading_is_tried_when_asked_for(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.checks, "whoami", lambda: doctor.checks.Check("Kaggle account", "warn", "refused"))
    assert doctor.session("")["upload"] is None and server.calls == []
    assert doctor.session("dataset:owner/my-slug")["upload"] == "ok"
    assert set(server.sent("CreateDataset")) == {"doctor.txt"}
    server.status = 403
    told = doctor.session("dataset:owner/my-slug")["upload"]
    assert "these credentials are not enough" in told and KAGGLE_TOKEN not in told
