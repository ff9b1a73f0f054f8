"""check_env on an imitation of Kaggle's machine: each thing that can be wrong is told, with what mends it."""

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest
from test_check_env import P100, T4S, fake_gpu, named

from jgpt.checks import machine
from jgpt.checks.verdict import Check
from jgpt.kaggle.session import checks

PLANTED = "planted-secret-0123456789"


class Client:
    """What Kaggle's image has as kaggle_secrets.UserSecretsClient."""

    labels: tuple[str, ...] = ("HF_TOKEN", "KAGGLE_KEY")

    def get_secret(self, label: str) -> str:
        if label not in self.labels:
            raise ConnectionError("no such secret")
        return PLANTED


@pytest.fixture(autouse=True)
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Imitate the machine: its folders, its variables, its secrets, two T4s, and the internet on."""
    for name in ("working", "temp", "input/datasets/me/texts", "input/old-layout"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "input/datasets/me/texts/a.txt").write_text("x" * 2_000_000)
    (tmp_path / "input/old-layout/b.txt").write_text("b")
    (tmp_path / "session").write_text(PLANTED)
    module = ModuleType("kaggle_secrets")
    module.UserSecretsClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    for name, value in {
        "KAGGLE_KERNEL_RUN_TYPE": "Batch", "JGPT_KAGGLE_ROOT": tmp_path, "KAGGLE_API_V1_TOKEN": tmp_path / "session",
        "KAGGLE_USER_SECRETS_TOKEN": PLANTED,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    for label in ("HF_TOKEN", "JAX_PLATFORMS"):
        monkeypatch.delenv(label, raising=False)
    monkeypatch.setattr(Client, "labels", Client.labels)
    monkeypatch.setattr(machine, "has_internet", lambda: True)
    monkeypatch.setattr(machine, "gpus_in_machine", lambda: ["Tesla T4"] * 2)
    monkeypatch.setattr("kagglehub.whoami", lambda verbose: {"username": "me"})
    monkeypatch.setattr(jax, "local_devices", lambda: T4S)
    monkeypatch.setattr(machine, "matmul_speed", lambda device: [])
    monkeypatch.setattr(machine, "all_reduce_speed", lambda found: [])
    return tmp_path


def found(root: Path) -> dict[str, Check]:
    sections = machine.check_all(root / "working", quick=False, place=checks)
    told = {check.name: check for section in sections.values() for check in section}
    assert PLANTED not in str(sections)
    assert all(check.fix for check in told.values() if check.state in ("warn", "FAIL")), told
    return told


def test_a_session_that_is_as_it_should_be(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    (kaggle / "commit").write_text("abcdef0123\n")
    monkeypatch.setattr(checks, "IMAGE_FILES", (str(kaggle / "commit"), "/nowhere"))
    told = found(kaggle)
    assert told["GPUs"] == Check("GPUs", "ok", "both T4s")
    assert told["internet"] == Check("internet", "ok", "on")
    assert told["secrets"] == Check("secrets", "ok", "attached: HF_TOKEN, KAGGLE_KEY")
    assert told["session token"].value == "present" and told["Kaggle account"].value == "me"
    assert told["image"].value == "commit abcdef0123"
    assert told["inputs"].value == "datasets/me/texts (2.0 MB), old-layout (0.0 MB)"
    assert "of the 19.5 that are kept, 0.0 GB used" in told["working"].value


@pytest.mark.parametrize(
    ("devices", "gpus", "words"),
    [
        (T4S[:1], ["Tesla T4"], "one T4 of the two"),
        ([P100], ["Tesla P100-PCIE-16GB"], "Tesla P100-PCIE-16GB, not Kaggle's two T4s"),
        ([fake_gpu("NVIDIA L4", "8.9")], ["NVIDIA L4"], "NVIDIA L4, not Kaggle's two T4s"),
        ([], [], "none, not Kaggle's two T4s"),
        (T4S[:1], ["Tesla T4"] * 2, "JAX sees 1 of 2"),
    ],
)
def test_one_gpu_and_the_wrong_one(kaggle: Path, monkeypatch, devices: Any, gpus: list[str], words: str):
    cpu = jax.devices("cpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices or cpu)
    monkeypatch.setattr(machine, "gpus_in_machine", lambda: gpus)
    check = found(kaggle)["GPUs"]
    assert check.state == "warn" and words in check.value
    assert ('"machine_shape": "NvidiaTeslaT4"' in check.fix) == (len(gpus) < 2)


def test_internet_off(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "has_internet", lambda: False)
    told = found(kaggle)
    assert told["internet"].state == "warn" and "fine for char, bpe and mounted tokenizers" in told["internet"].value
    assert "Settings > Internet on" in told["internet"].fix
    assert "the internet is off" in told["secrets"].value and "Kaggle account" not in told


def test_missing_secrets(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Client, "labels", ("WANDB_API_KEY",))
    monkeypatch.delenv("KAGGLE_API_V1_TOKEN")
    told = found(kaggle)
    assert told["secrets"].state == "warn" and told["secrets"].value.startswith(
        "attached: WANDB_API_KEY; without HF_TOKEN"
    )
    assert "Add-ons > Secrets" in told["secrets"].fix and told["session token"].value == "absent"
    monkeypatch.setitem(sys.modules, "kaggle_secrets", None)  # an image without it
    assert "cannot be read: ModuleNotFoundError" in found(kaggle)["secrets"].value


def test_an_account_that_is_refused(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(verbose: bool) -> None:
        raise RuntimeError(f"401 for Bearer {PLANTED}")

    monkeypatch.setattr("kagglehub.whoami", refuse)
    assert found(kaggle)["Kaggle account"].state == "warn"


def test_too_little_disk(kaggle: Path, monkeypatch: pytest.MonkeyPatch):
    with (kaggle / "working" / "large").open("wb") as file:
        file.truncate(16_000_000_000)  # sparse: it takes nothing here
    check = found(kaggle)["working"]
    assert check.state == "warn" and check.value.startswith("3.5 GB left of the 19.5") and "remove" in check.fix
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 9, 10**9))
    assert found(kaggle)["scratch"][1:3] == ("warn", f"1.0 GB free at {kaggle / 'temp'}")
    shutil.rmtree(kaggle / "working")
    assert named(checks.disks(), "working").state == "FAIL"


def test_nothing_mounted(kaggle: Path):
    shutil.rmtree(kaggle / "input")
    assert found(kaggle)["inputs"].state == "warn" and "Add Input" in found(kaggle)["inputs"].fix


def test_the_command_tells_it_all(kaggle: Path, command):
    result = command("check_env", "--json", f"--run_dir={kaggle / 'working'}")
    assert result.code == 0, result.out + result.err
    assert {check["name"] for check in json.loads(result.out)["machine"]} >= {"image", "working", "scratch", "inputs"}
    assert PLANTED not in result.out + result.err
