import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest

from jgpt.errors import UserError
from jgpt.hardware import devices, process
from jgpt.parallel import build


def fake_gpu(kind: str, capability: str) -> Any:
    return SimpleNamespace(device_kind=kind, compute_capability=capability, platform="gpu")


def in_new_process(code: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "NCCL_", "TF_CPP"))}
    inherited["JAX_PLATFORMS"] = "cpu"
    code = "import os, jax; from jgpt.hardware.process import set_up_process\n" + code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("kind", "capability", "name", "fp16_peak"),
    [
        ("Tesla T4", "7.5", "T4", 65e12),
        ("Tesla P100-PCIE-16GB", "6.0", "P100 PCIe", 18.7e12),
        ("Tesla V100-SXM2-32GB", "7.0", "V100 SXM2", 125e12),
        ("NVIDIA A100-SXM4-40GB", "8.0", "A100 40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", "8.0", "A100 80GB SXM", 312e12),
        ("NVIDIA A100 80GB PCIe", "8.0", "A100 80GB PCIe", 312e12),
        ("NVIDIA A10G", "8.6", "A10G", 70e12),
        ("NVIDIA GeForce RTX 3090", "8.6", "RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", "8.9", "RTX 4090", 165.2e12),
        ("NVIDIA L4", "8.9", "L4", 121e12),
        ("NVIDIA H100 PCIe", "9.0", "H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", "9.0", "H100 SXM", 989.4e12),
        ("NVIDIA H200", "9.0", "H200 SXM", 989.4e12),
    ],
)
def test_known_gpus_are_found_by_the_name_that_jax_gives(kind, capability, name, fp16_peak):
    chip = devices.describe(fake_gpu(kind, capability))
    assert chip.name == name
    assert chip.peak_flops["fp16"] == fp16_peak
    assert chip.compute_capability == devices.compute_capability(fake_gpu(kind, capability))


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA L40S", "NVIDIA A10", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_a_gpu_with_a_similar_name_has_no_peaks_rather_than_wrong_ones(kind):
    chip = devices.describe(fake_gpu(kind, "8.9"))
    assert chip == devices.Chip(kind, (8, 9), {"fp32": None, "fp16": None, "bf16": None}, None, None)


def test_table_is_consistent():
    for _, chip in devices._KNOWN_GPUS:
        fp32, fp16, bf16 = (chip.peak_flops[dtype] for dtype in ("fp32", "fp16", "bf16"))
        assert fp32 and fp16 and bf16 and chip.compute_capability and chip.memory_bytes and chip.memory_bandwidth
        assert bf16 == (fp16 if chip.compute_capability >= (8, 0) else fp32)  # no bf16 units before Ampere
        assert fp16 > fp32
        assert 1e10 < chip.memory_bytes < 2e11
        assert 2e11 < chip.memory_bandwidth < 1e13


def test_a_cpu_has_a_name_and_nothing_else():
    chip = devices.describe(jax.devices("cpu")[0])
    assert chip.name == "cpu"
    assert chip.compute_capability is None
    assert set(chip.peak_flops.values()) == {None}


COUNT = "set_up_process(); print(len(jax.devices()))"


def test_process_gets_a_cpu_device_for_each_core():
    assert in_new_process(COUNT) == str(process.usable_cores())


@pytest.mark.parametrize(
    "environment", [{"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, {"JAX_NUM_CPU_DEVICES": "3"}]
)
def test_device_count_that_the_user_set_wins(environment):
    assert in_new_process(COUNT, **environment) == "3"


def test_set_up_after_the_devices_are_in_use_changes_nothing():
    assert in_new_process("jax.devices(); " + COUNT) == "1"


def test_set_up_keeps_the_users_environment():
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_CUMEM_HOST_ENABLE")
    code = f"set_up_process(); print(*map(os.environ.get, {names}))"
    assert in_new_process(code) == "0.92 None 0"
    assert in_new_process(code, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", NCCL_CUMEM_HOST_ENABLE="1") == "None 0.5 1"


def test_tensorflow_in_the_process_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    with pytest.raises(UserError, match=r"TensorFlow is imported.*all-reduce.*process of its own"):
        process.set_up_process()


COMPILE = """
import jax.numpy, warnings
from jgpt.hardware.process import keep_compiled_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
if {gpu}: jax.default_backend = lambda: "gpu"
keep_compiled_programs()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(jax.jit(lambda x: x * 3)(jax.numpy.float32(2)), len(told) > 0)
"""


def test_compiled_programs_are_kept_for_accelerators_and_damaged_ones_do_no_harm(tmp_path):
    kept = tmp_path / "jgpt" / "compiled"
    assert in_new_process(COMPILE.format(gpu=False), XDG_CACHE_HOME=str(tmp_path)) == "6.0 False"
    assert not kept.exists()
    assert in_new_process(COMPILE.format(gpu=True), XDG_CACHE_HOME=str(tmp_path)) == "6.0 False"
    entries = list(kept.glob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:50])
    assert in_new_process(COMPILE.format(gpu=True), XDG_CACHE_HOME=str(tmp_path)) == "6.0 True"


def test_the_users_own_cache_and_no_place_for_one(tmp_path):
    (tmp_path / "file").write_text("")
    code = COMPILE.format(gpu=True) + "print(jax.config.jax_compilation_cache_dir)"
    own = in_new_process(code, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert own.splitlines()[-1] == str(tmp_path / "own") and not (tmp_path / "jgpt").exists()
    assert in_new_process(code, XDG_CACHE_HOME=str(tmp_path / "file")).splitlines() == ["6.0 False", "None"]


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert process.usable_cores() == os.cpu_count()


def test_cpu_devices_are_as_many_as_divide_the_batch():
    both = jax.local_devices()
    assert len(both) == 2
    assert build.training_devices(12) == both
    assert build.training_devices(7) == both[:1]


def test_gpus_are_all_used_or_the_batch_is_refused(monkeypatch):
    pair = [fake_gpu("Tesla T4", "7.5")] * 2
    monkeypatch.setattr(jax, "local_devices", lambda: pair)
    assert build.training_devices(12) == pair
    with pytest.raises(UserError, match=r"is 7, and this machine has 2 devices.*multiple of 2.*global_batch_size=8"):
        build.training_devices(7)


def test_free_memory_is_what_the_allocator_says_else_the_cards():
    """A T4 as JAX shows it, with and without an allocator that counts; a CPU has none."""
    counts = SimpleNamespace(
        **vars(fake_gpu("Tesla T4", "7.5")), memory_stats=lambda: dict(bytes_limit=9, bytes_in_use=2)
    )
    silent = SimpleNamespace(**vars(fake_gpu("Tesla T4", "7.5")), memory_stats=lambda: None)
    assert devices.free_memory(counts) == 7  # type: ignore[arg-type]
    assert devices.free_memory(silent) == devices.describe(silent).memory_bytes  # type: ignore[arg-type]
    assert devices.free_memory(jax.local_devices()[0]) is None
