"""Kaggle's other free machine, a TPU v5e-8: what a push sends, its hours, and what is said where something is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from fake_kaggle import FakeKaggle, Version

from jgpt.checks import machine, tpu
from jgpt.checks.verdict import Check
from jgpt.config import default_config
from jgpt.errors import UserError
from jgpt.hardware import pci
from jgpt.kaggle.laptop.kernel import Kernel, metadata
from jgpt.kaggle.session import checks, doctor, limits, measure
from jgpt.kaggle.session.limits import fit_to_kaggle
from jgpt.kaggle.session.machines import GPU, TPU, this_machine

SLUG = "owner/my-gpt"
CONFIGS = Path(__file__).parents[2] / "configs"
ON_TPU = [f"--config={CONFIGS}/kaggle_tpu.py", f"--slug={SLUG}", "--accelerator=TpuV5E8"]
MIB = 2**20


def chip(number: int, platform: str = "tpu") -> Any:
    memory = {"bytes_limit": int(15.75 * 2**30)}
    return SimpleNamespace(
        id=number, device_kind="TPU v5 lite", platform=platform, memory_stats=lambda: memory, coords=(0, 0, 0)
    )


CHIPS = [chip(n) for n in range(8)]


@pytest.fixture
def server(kaggle: FakeKaggle, tmp_path, monkeypatch) -> FakeKaggle:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jgpt.kaggle.laptop.kernel._archive", lambda files: b"nothing runs")
    return kaggle


@pytest.fixture
def verb(command, server):
    return lambda name, *flags: command("kaggle.__main__", name, *flags)


@pytest.fixture
def pci_bus(tmp_path, monkeypatch):
    """Return a function that puts so many chips on this machine's bus, beside a network card of Google's."""

    def put(chips: int) -> None:
        for number, device in enumerate(["0x0042", *["0x0063"] * chips]):
            folder = tmp_path / "pci" / f"0000:00:{number:02}.0"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "vendor").write_text("0x1ae0\n")
            (folder / "device").write_text(f"{device}\n")
        monkeypatch.setattr(pci, "PCI_DEVICES", tmp_path / "pci")

    return put


@pytest.fixture
def on_kaggle(tmp_path, monkeypatch):
    for name in ("working", "input", "temp"):
        (tmp_path / "kaggle" / name).mkdir(parents=True)
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(limits, "session_hours", lambda: 0.25)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)


def test_a_push_asks_for_the_tpu_and_for_nothing_of_a_gpu(verb, server):
    result = verb("push", *ON_TPU, "--internet")
    assert result.code == 0, result.err
    sent = server.kernels[SLUG][0].request
    assert (sent["machineShape"], sent["enableTpu"], sent.get("enableGpu", False)) == ("TpuV5E8", True, False)
    assert not sent.get("dockerImage")
    assert "accelerator='TpuV5E8', internet=True" in sent["text"].splitlines()[-1]
    resumed = verb("resume", f"--slug={SLUG}", "--dry_run")
    shown = json.loads(resumed.out[resumed.out.index("{") : resumed.out.rindex("}") + 1])
    assert shown["machine_shape"] == "TpuV5E8" and shown["enable_tpu"] and not shown["enable_gpu"]


def test_the_metadata_of_other_machines_asks_for_no_tpu():
    for accelerator in ("NvidiaTeslaT4", ""):
        found = metadata(Kernel(SLUG, accelerator=accelerator))
        assert (found["enable_tpu"], found["enable_gpu"]) == (False, bool(accelerator))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.deadline_hours=10"], ["deadline_hours=10", "kills a TPU session after 9 hours", "8.25"]),
        (["--config.precision.compute=fp16"], ["precision.compute='fp16' on a TPU", "'auto', 'bf16', 'fp32'"]),
        (["--docker_image=gcr.io/kaggle-images/python@sha256:1"], ["docker_image=", "gives a CPU", "issue 1197"]),
    ],
)
def test_what_a_push_to_a_tpu_refuses(verb, server, flags, parts):
    result = verb("push", *ON_TPU, *flags)
    assert result.code == 2 and "Traceback" not in result.err and server.requests == []
    for part in parts:
        assert part in result.err, result.err


def test_a_run_moves_to_the_tpu_from_a_gpu_with_a_pinned_image(verb, server):
    on_t4s = [ON_TPU[0], f"--slug={SLUG}", "--docker_image=gcr.io/kaggle-images/python@sha256:1", "--dry_run"]
    assert verb("push", *on_t4s).code == 0
    moved = ["resume", f"--slug={SLUG}", "--accelerator=TpuV5E8", "--dry_run"]
    refused = verb(*moved)
    assert refused.code == 2 and "--docker_image=" in refused.err
    assert verb(*moved, "--docker_image=").code == 0


def test_status_and_chain_count_tpu_hours(verb, server):
    server.used_hours, server.used_tpu_hours = 30.0, 14.0

    def trains(version: Version, earlier: list[Version]) -> None:
        version.states = ["RUNNING", "COMPLETE"]
        status = {
            "state": "stopped",
            "step": 100 * len(server.kernels[SLUG]),
            "total_steps": 5000,
            "reason": "deadline",
        }
        version.files = {"outputs/status.json": json.dumps(status).encode()}
        server.used_tpu_hours += 5.6

    server.on_save = trains
    result = verb("chain", *ON_TPU, "--internet", "--hours=40", "--poll_seconds=1")
    assert result.code == 0, result.err
    assert (
        "stopping here. TPU hours: 19.6 of this week's 20 used" in result.out
    )  # no GPU hour is left, and none is needed
    assert len(server.kernels[SLUG]) == 1
    assert "--config.deadline_hours=5.75" in server.kernels[SLUG][0].request["text"].splitlines()[0]
    shown = verb("status", f"--slug={SLUG}").out
    assert "GPU hours: 30.0 of this week's 30 used" in shown and "TPU hours: 19.6 of this week's 20 used" in shown


def test_a_session_knows_its_machine_by_what_was_asked_for_or_by_its_chips(pci_bus, monkeypatch):
    monkeypatch.delenv("JGPT_KAGGLE_ACCELERATOR", raising=False)
    pci_bus(0)
    assert this_machine() is GPU
    pci_bus(8)  # a notebook, which nobody pushed
    assert pci.tpu_chips() == 8 and this_machine() is TPU
    monkeypatch.setenv("JGPT_KAGGLE_ACCELERATOR", "")
    assert this_machine() is GPU
    monkeypatch.setenv("JGPT_KAGGLE_ACCELERATOR", "TpuV5E8")
    assert this_machine() is TPU


def test_a_session_ends_before_kaggle_ends_it(on_kaggle, monkeypatch, caplog):
    caplog.set_level("INFO", "jgpt")
    monkeypatch.setenv("JGPT_KAGGLE_ACCELERATOR", "TpuV5E8")
    config = default_config()
    assert fit_to_kaggle(config).deadline_hours == 8.0
    assert "Kaggle kills a session after 9 hours, this one is 0.25 hours old, and the last 45 minutes" in caplog.text
    config.deadline_hours = 11.0  # as configs for two T4s may have it
    with pytest.raises(UserError, match=r"deadline_hours=11: .* TPU session after 9 hours.*--config.deadline_hours=0"):
        fit_to_kaggle(config)
    monkeypatch.setenv("JGPT_KAGGLE_ACCELERATOR", "NvidiaTeslaT4")
    assert fit_to_kaggle(config).deadline_hours == 11.0


@pytest.mark.parametrize(
    ("found", "in_machine", "expected", "state"),
    [
        (CHIPS, 8, "all 8 of the TPU v5e-8", "ok"),
        (CHIPS[:4], 8, "JAX sees 4 of 8", "warn"),
        ([], 8, "8 in the machine, none seen by JAX", "FAIL"),
        ([], 0, "none, and a TPU v5e-8 was asked for", "FAIL"),  # the image was another one
    ],
)
def test_check_env_on_a_tpu(on_kaggle, pci_bus, monkeypatch, found, in_machine, expected, state):
    pci_bus(in_machine)
    cpu = jax.devices("cpu")
    monkeypatch.setattr(jax, "local_devices", lambda: found or cpu)
    monkeypatch.setattr(machine, "gpus_in_machine", lambda: [])
    monkeypatch.setenv("JGPT_KAGGLE_ACCELERATOR", "TpuV5E8")
    sections = machine.check_all(Path(), quick=True, place=checks)
    seen = {check.name: check for checks in sections.values() for check in checks}
    assert seen[tpu.CHIPS][1:3] == (state, expected) and "GPUs" not in seen
    assert bool(seen[tpu.CHIPS].fix) == (state != "ok")
    assert ("libtpu" in seen) == bool(in_machine)
    if found:
        assert seen["device 0"].value == "TPU v5 lite, 15.8 GiB of HBM for JAX"


def test_elsewhere_check_env_names_the_chips_and_how_to_install_libtpu(pci_bus, monkeypatch):
    pci_bus(4)
    assert machine.accelerators(CHIPS[:4], []) == [Check(tpu.CHIPS, "ok", "4")]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "unset JAX_PLATFORMS" in machine.accelerators(jax.devices("cpu"), [])[0].fix
    missing = tpu.libtpu()
    if missing.state != "ok":
        assert missing.fix == f'pip install "jax[tpu]=={jax.__version__}"'


def test_a_tpus_speed_is_that_of_bf16(monkeypatch):
    """Measured for real, on this machine's CPU in the place of a TPU."""
    cpus, asked = jax.devices("cpu"), []

    def flops(device: Any, dtype: Any, size: int, seconds: float) -> float:
        asked.append(jax.numpy.dtype(dtype).name)
        return 98.5e12

    monkeypatch.setattr(machine.speed, "matmul_flops", flops)
    shown = {check.name: check for check in machine.matmul_speed(CHIPS[0])}
    assert set(shown) == {"bf16 matmul", "fp32 matmul"} and "50% of the peak" in shown["bf16 matmul"].value
    monkeypatch.setattr(measure, "local_devices", lambda: [chip(0), chip(1)])
    assert set(measure.matmul(0.1)) >= {"bf16_alone", "bf16_together", "fp32_together", "bf16_first_second"}
    assert "float16" not in asked
    assert measure._small_gpt("folder", on_cpu=False).precision.compute == "bf16"
    monkeypatch.setattr(measure, "local_devices", lambda: cpus)
    assert measure.half_precision() == "fp16"


def test_the_doctor_measures_no_nccl_on_a_tpu(pci_bus, monkeypatch):
    pci_bus(8)
    monkeypatch.setattr(doctor, "measure", lambda part, seconds, variables=None: {"flops": 1.0, "devices": 8})
    for part in ("disks", "sigterm", "versions"):
        monkeypatch.setattr(doctor, part, lambda: {})
    monkeypatch.setattr(doctor, "session", lambda upload: {})
    monkeypatch.setattr(doctor, "_reaches", lambda host: False)
    report = doctor.examine(0.1, "")
    assert report["tpu_chips"] == 8 and report["all_reduce"]["cumem_off"] is None
    assert report["all_reduce"]["default"]["devices"] == 8


def test_a_kernel_read_back_is_the_one_that_was_written(tmp_path):
    kernel = Kernel(SLUG, accelerator="TpuV5E8")
    kernel.check()
    with pytest.raises(UserError, match="docker_image"):
        replace(kernel, docker_image="gcr.io/x").check()
