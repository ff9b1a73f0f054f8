"""The devices that are here, the table of known ones, and how a process is set up for them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest

from jgpt.errors import UserError
from jgpt.hardware import devices, process
from jgpt.hardware.chips import CHIPS, GPUS, unknown_chip


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
    chip = devices.chip_of(fake_gpu(kind, capability))
    assert chip.name == name
    assert chip.peak_flops["fp16"] == fp16_peak
    assert chip.compute_capability == devices.compute_capability(fake_gpu(kind, capability))


@pytest.mark.parametrize(
    "kind",
    ["NVIDIA L40S", "NVIDIA A10", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"],
)
def test_a_gpu_with_a_similar_name_has_no_peaks_rather_than_wrong_ones(kind):
    chip = devices.chip_of(fake_gpu(kind, "8.9"))
    assert chip == unknown_chip(kind, (8, 9)) and set(chip.peak_flops.values()) == {None} and chip.rates is None


def test_table_is_consistent():
    assert len({chip.name for chip in CHIPS}) == len({chip.pattern for chip in CHIPS}) == len(CHIPS)
    for chip in GPUS:
        fp32, fp16, bf16 = (chip.peak_flops[dtype] for dtype in ("fp32", "fp16", "bf16"))
        assert fp32 and fp16 and bf16 and chip.compute_capability and chip.memory_bytes and chip.memory_bandwidth
        assert bf16 == (fp16 if chip.compute_capability >= (8, 0) else fp32)  # no bf16 units before Ampere
        assert fp16 > fp32
        assert 1e10 < chip.memory_bytes < 2e11
        assert 2e11 < chip.memory_bandwidth < 1e13
        # What CUDA leaves of a card, and what a program sustains of its speed, is less than the data sheet says.
        assert chip.usable_bytes and 0.9 < chip.usable_bytes / chip.memory_bytes <= 1
        assert chip.rates and 0 < chip.rates.fp16_flops < fp16 and 0 < chip.rates.fp32_flops < fp32
        assert 0 < chip.rates.bandwidth < chip.memory_bandwidth
        tensor_cores = chip.compute_capability >= (7, 0)
        assert (chip.rates.fp16_flops > chip.rates.fp32_flops) == tensor_cores


def test_a_cpu_has_a_name_and_nothing_else():
    chip = devices.chip_of(jax.devices("cpu")[0])
    assert chip.name == "cpu"
    assert chip.compute_capability is None
    assert set(chip.peak_flops.values()) == {None}


SET_UP = """
set_up_process()
print(len(jax.devices()), *map(os.environ.get, {names}))
""".format(names=("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_CUMEM_HOST_ENABLE"))


def test_process_gets_a_cpu_device_for_each_core():
    assert in_new_process(SET_UP) == f"{process.usable_cores()} 0.92 None 0"


@pytest.mark.parametrize(
    "count", [{"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, {"JAX_NUM_CPU_DEVICES": "3"}]
)
def test_what_the_user_set_wins(count: dict[str, str]):
    own = in_new_process(SET_UP, **count, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", NCCL_CUMEM_HOST_ENABLE="1")
    assert own == "3 None 0.5 1"


def test_set_up_after_the_devices_are_in_use_changes_nothing():
    assert in_new_process("jax.devices()" + SET_UP) == "1 0.92 None 0"


def test_tensorflow_in_the_process_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    with pytest.raises(UserError, match=r"TensorFlow is imported.*all-reduce.*process of its own"):
        process.set_up_process()


COMPILE = """
import jax.numpy, warnings
from jgpt.hardware.process import keep_compiled_programs, user_cache
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
keep_compiled_programs()
assert jax.config.jax_compilation_cache_dir is None and not user_cache().exists()  # a CPU's programs are not kept
jax.default_backend = lambda: "gpu"
keep_compiled_programs()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(jax.jit(lambda x: x * 3)(jax.numpy.float32(2)), len(caught) > 0)
"""


def test_compiled_programs_are_kept_for_accelerators_and_damaged_ones_do_no_harm(tmp_path):
    assert in_new_process(COMPILE, XDG_CACHE_HOME=str(tmp_path)) == "6.0 False"
    entries = list((tmp_path / "jgpt" / "compiled").glob("*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:50])
    damaged = COMPILE.replace("and not user_cache().exists()", "")
    assert in_new_process(damaged, XDG_CACHE_HOME=str(tmp_path)) == "6.0 True"


@pytest.fixture
def cache_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str | None]]:
    """As on a GPU whose user has named no cache; return where compiled programs are kept."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_compilation_cache_max_size", before[1])


def test_the_users_own_cache_stays(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "own")
    process.keep_compiled_programs()
    assert cache_dir() == "own" and not (tmp_path / "jgpt").exists()


def test_where_there_is_no_place_for_a_cache_nothing_is_kept(cache_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    process.keep_compiled_programs()
    assert cache_dir() is None


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert process.usable_cores() == os.cpu_count()


def test_free_memory_is_what_the_allocator_says_else_the_cards():
    """A T4 as JAX shows it, with and without an allocator that counts; a CPU has none."""
    counts = SimpleNamespace(
        **vars(fake_gpu("Tesla T4", "7.5")), memory_stats=lambda: dict(bytes_limit=9, bytes_in_use=2)
    )
    silent = SimpleNamespace(**vars(fake_gpu("Tesla T4", "7.5")), memory_stats=lambda: None)
    assert devices.free_memory(counts) == 7  # type: ignore[arg-type]
    assert devices.free_memory(silent) == devices.chip_of(silent).usable_bytes  # type: ignore[arg-type]
    assert devices.free_memory(jax.local_devices()[0]) is None


def test_a_tpu_is_known_by_its_name_and_fits_bf16_only():
    chip = devices.chip_of(SimpleNamespace(device_kind="TPU v5 lite", platform="tpu"))  # type: ignore[arg-type]
    assert chip.name == "TPU v5e" and chip.compute_capability is None and chip.matrix_side == 128
    assert chip.peak_flops["bf16"] == 197e12 and chip.peak_flops["fp16"] is None
    assert chip.usable_bytes and chip.memory_bytes and chip.usable_bytes < chip.memory_bytes == 16 * 2**30
    other = devices.chip_of(SimpleNamespace(device_kind="TPU v5", platform="tpu"))  # type: ignore[arg-type]
    assert other.name == "TPU v5" and other.rates is None  # a v5p
