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

from jgpt.model.attention.flash.launch import ptx
from jgpt.model.attention.flash.shapes import SHAPES, WIDTHS, entry

NVCC = "release 13.0"  # whose PTX is in the package
PAIRS = list(SHAPES)


def tool(name: str) -> str:
    """Return CUDA's compiler or assembler of the right version; skip without."""
    found = shutil.which(os.environ.get(name.upper(), name))
    if found is None:
        pytest.skip(f"needs {name} of CUDA 13.0")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    if NVCC not in version:
        pytest.skip(f"needs {name} of CUDA 13.0; this one is {version.strip().splitlines()[-1]}")
    return found


def test_the_ptx_is_what_the_sources_give(tmp_path: Path):
    environment = {**os.environ, "PYTHON": sys.executable, "NVCC": tool("nvcc")}
    subprocess.run(["bash", str(SOURCE / "build.sh"), str(tmp_path)], check=True, env=environment)
    built = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(built) == {f"{entry(*pair)}.ptx" for pair in PAIRS} == {file.name for file in (SOURCE / "ptx").iterdir()}
    for name, text in built.items():
        assert text == (SOURCE / "ptx" / name).read_text(), f"{name} is old: run jgpt/model/attention/flash/build.sh"


@pytest.mark.parametrize(("kernel", "width"), PAIRS)
def test_a_t4_has_the_registers(tmp_path: Path, kernel: str, width: int):
    """No number is spilled to memory, and as many blocks run at once as the table says."""
    file = SOURCE / "ptx" / f"{entry(kernel, width)}.ptx"
    command = [tool("ptxas"), "-arch=sm_75", "-v", str(file), "-o", str(tmp_path / "cubin")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    registers = int(re.findall(r"Used (\d+) registers", said)[0])
    shape = SHAPES[kernel, width]
    each_warp = -(-registers * 32 // 256) * 256  # registers are given in units of 256
    assert each_warp * shape.warps * shape.blocks <= 65_536


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
