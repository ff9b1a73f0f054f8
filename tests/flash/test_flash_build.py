"""The PTX in the package: what the sources give, with no spilled registers on a T4, and small."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import SOURCE
from flash_on_paper import assemble, blocks_of_sm, cycles, find_ptxas, useful_share

from jgpt.model.attention.flash.launch import ptx
from jgpt.model.attention.flash.shapes import SHAPES, WIDTHS, entry

NVCC = "release 13.0"  # whose PTX is in the package
PAIRS = list(SHAPES)


def nvcc() -> str:
    """Return CUDA's compiler in the right version; skip without."""
    found = shutil.which(os.environ.get("NVCC", "nvcc"))
    if found is None:
        pytest.skip("needs nvcc of CUDA 13.0: pip install nvidia-cuda-nvcc==13.0.88")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    if NVCC not in version:
        pytest.skip(f"needs nvcc of CUDA 13.0; this one is {version.strip().splitlines()[-1]}")
    return found


def test_the_ptx_is_what_the_sources_give(tmp_path: Path):
    environment = {**os.environ, "PYTHON": sys.executable, "NVCC": nvcc()}
    subprocess.run(["bash", str(SOURCE / "build.sh"), str(tmp_path)], check=True, env=environment)
    built = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(built) == {f"{entry(*pair)}.ptx" for pair in PAIRS} == {file.name for file in (SOURCE / "ptx").iterdir()}
    for name, text in built.items():
        assert text == (SOURCE / "ptx" / name).read_text(), f"{name} is old: run jgpt/model/attention/flash/build.sh"


@pytest.mark.parametrize(("kernel", "width"), PAIRS)
def test_a_t4_has_the_registers(kernel: str, width: int):
    """By the ptxas that is here, of any version: nothing is spilled, and an SM runs as many blocks as SHAPES says."""
    if (ptxas := find_ptxas()) is None:
        pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc-cu12")
    made = assemble(ptxas, kernel, width)
    assert made.spilled_bytes == 0
    assert blocks_of_sm(kernel, width, made.registers) >= SHAPES[kernel, width].blocks


def test_the_work_of_the_units_on_paper():
    """GPT-2's forward pass, by hand: a warp multiplies [32, 64] by [64, 32] twice, 131,072 multiply-adds."""
    units = cycles("forward", 64)
    assert units == {"tensor": 2 * 32 * 32 * 64 / 512, "shared": (2 + 2 / 4) * 4096 / 64, "special": 128, "fp32": 48}
    assert useful_share("forward", 64, 128) == pytest.approx((128 * 129 / 2) / 128**2)
    assert useful_share("backward_kv", 64, 1 << 14) > 0.98


def test_what_the_ptx_asks_for():
    for kernel, width in PAIRS:
        text = ptx(kernel, width)
        assert text.startswith(".version 6.5\n.target sm_75\n")
        assert f".visible .entry {entry(kernel, width)}(" in text
        assert "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32" in text and "ldmatrix" in text
        assert not re.search(r"\b(atom|red)\.", text) and ".local" not in text
    assert {width for _, width in PAIRS} == set(WIDTHS)


def test_the_ptx_is_small():
    """A Kaggle kernel carries all of jgpt in a script of less than 700 KB."""
    assert len(gzip.compress("".join(ptx(*pair) for pair in PAIRS).encode())) < 200_000
