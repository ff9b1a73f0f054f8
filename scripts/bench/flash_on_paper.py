"""What a T4 makes of our attention kernels, without a T4: registers, occupancy, and the work of each of its units.

    python scripts/bench/flash_on_paper.py [--ptxas PATH] [--json paper.json]

Assembles the PTX of the package for sm_75 with `ptxas -v`, of CUDA 12.0 or newer: the one on the path, or that of the
wheel (pip install nvidia-cuda-nvcc-cu12). No GPU and no driver. Prints the tables of docs/flash.md. Everything but the
columns of ptxas is arithmetic, under these assumptions (NVIDIA's data sheet of the T4; Jia et al., arXiv 1903.07486):

- An SM has 65,536 registers, 64 KiB of shared memory and room for 32 warps. A T4 has 40 SMs.
- In a cycle an SM does 512 multiply-adds of mma.m16n8k8, moves 64 bytes of shared memory, does 16 exponentials or
  conversions to fp16, and 64 additions or multiplications in fp32.
- Keys and values of a head are read from the L2 cache (1,270 GB/s) after the first time, the rest from memory.
- In large products a T4 does 24 TFLOP/s, because of its 70 W, of 65 on paper; it moves 256 GB/s, of 320.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's jgpt, installed or not

from jgpt.model.attention.flash.launch import ptx
from jgpt.model.attention.flash.shapes import SHAPES

REGISTERS, SHARED_BYTES, WARPS = 65_536, 64 << 10, 32  # of an SM
MULTIPLY_ADDS, SHARED_RATE, SPECIAL_RATE, FP32_RATE = 512, 64, 16, 64  # of an SM in a cycle
PRODUCTS = {"forward": 2, "backward_q": 3, "backward_kv": 4}  # of [rows, columns, H], for a tile of scores
SPECIAL = {"forward": 2, "backward_q": 2, "backward_kv": 3}  # exponentials and conversions of a score
FP32 = {"forward": 3, "backward_q": 2, "backward_kv": 2}  # operations of a score
ARRAYS = {"forward": 4, "backward_q": 6, "backward_kv": 6}  # of [T, H] that a head reads or writes
PEAK, SUSTAINED, BANDWIDTH = 65e12, 24e12, 256e9
LENGTH = 1024


class Assembled(NamedTuple):
    """What ptxas says of a kernel; `registers` of a thread."""

    registers: int
    spilled_bytes: int


def find_ptxas() -> str | None:
    """Return ptxas: on the path, or in a wheel of NVIDIA's; None where there is none."""
    wheels = (folder for path in filter(None, sys.path) for folder in Path(path).glob("nvidia/*/bin/ptxas"))
    return shutil.which("ptxas") or next((str(found) for found in wheels), None)


def assemble(ptxas: str, kernel: str, width: int) -> Assembled:
    """Assemble the PTX of a kernel for a T4. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx(kernel, width))
        command = [ptxas, "-arch=sm_75", "-v", str(file), "-o", f"{folder}/cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return Assembled(int(re.findall(r"Used (\d+) registers", said)[0]), spilled)


def blocks_of_sm(kernel: str, width: int, registers: int) -> int:
    """Return how many blocks an SM runs at once, by its registers, shared memory and warps."""
    shape = SHAPES[kernel, width]
    each_warp = -(-registers * 32 // 256) * 256  # registers are given in units of 256
    by_registers = REGISTERS // (each_warp * shape.warps)
    return min(by_registers, SHARED_BYTES // shape.shared_bytes(kernel, width), WARPS // shape.warps)


def cycles(kernel: str, width: int) -> dict[str, float]:
    """Return the cycles that each unit of an SM needs for one tile of scores of one warp."""
    shape = SHAPES[kernel, width]
    scores = 16 * shape.row_tiles * shape.columns
    tile = shape.columns * width * 2  # bytes of keys, say
    # Each product reads one tile whole; the warps of a block fill two tiles together.
    shared = PRODUCTS[kernel] * tile + 2 * tile / shape.warps
    return {
        "tensor": PRODUCTS[kernel] * scores * width / MULTIPLY_ADDS,
        "shared": shared / SHARED_RATE,
        "special": SPECIAL[kernel] * scores / SPECIAL_RATE,
        "fp32": FP32[kernel] * scores / FP32_RATE,
    }


def useful_share(kernel: str, width: int, length: int) -> float:
    """Return which share of the time of a block's warps goes into pairs that see each other, on average.

    A block goes on until the last of its warps has its last tile; where a tile crosses the diagonal it is whole.
    """
    shape = SHAPES[kernel, width]
    spent = 0
    for first in range(0, length, shape.rows):
        # Of keys and values it is the queries from the block's first key on.
        seen = length - first if kernel == "backward_kv" else min(first + shape.rows, length)
        spent += shape.rows * -(-seen // shape.columns) * shape.columns
    return length * (length + 1) / 2 / spent


def row(kernel: str, width: int, ptxas: str) -> dict[str, object]:
    """Return all that is known of a kernel."""
    shape, made = SHAPES[kernel, width], assemble(ptxas, kernel, width)
    blocks, units = blocks_of_sm(kernel, width, made.registers), cycles(kernel, width)
    flops = 2 * PRODUCTS[kernel] * shape.rows * shape.columns * width  # of a block's tile
    return {
        "kernel": kernel, "width": width, "tile": f"{shape.rows} x {shape.columns}", **made._asdict(),
        "shared_kib": round(shape.shared_bytes(kernel, width) / 1024, 1), "blocks": blocks,
        "warps": blocks * shape.warps, "occupancy": blocks * shape.warps / WARPS, "cycles": units,
        "tensor_busy": [units["tensor"] / sum(units.values()), units["tensor"] / max(units.values())],
        "flops_a_byte_of_l2": flops / (2 * shape.columns * width * 2),
        "flops_a_byte": PRODUCTS[kernel] * LENGTH / (2 * ARRAYS[kernel]),
        "useful": useful_share(kernel, width, LENGTH),
    }  # fmt: skip


def print_row(r: dict) -> None:
    """Print a row of the table in Markdown."""
    least, most = r["tensor_busy"]
    cells = [
        r["kernel"], r["width"], r["tile"], r["registers"], r["spilled_bytes"], f"{r['shared_kib']:.1f}", r["blocks"],
        f"{r['warps']} ({r['occupancy']:.0%})", *(f"{n:.0f}" for n in r["cycles"].values()),
        f"{least:.0%} to {most:.0%}", f"{r['flops_a_byte_of_l2']:.0f}", f"{r['useful']:.0%}",
    ]  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    """Assemble all kernels, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptxas", default=find_ptxas(), help="by default the one on the path, or of NVIDIA's wheel")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    flags = parser.parse_args()
    if flags.ptxas is None:
        sys.exit("There is no ptxas here. Run: pip install nvidia-cuda-nvcc-cu12. Or name one: --ptxas=PATH.")
    version = subprocess.run([flags.ptxas, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.findall(r"release \S+ V\S+", version)[0]
    print(f"ptxas {version}, sm_75\n")
    heads = "kernel, H, tile, registers, spilled, shared KiB, blocks an SM, warps an SM, tensor, shared, special, fp32"
    columns = [*heads.split(", "), "tensor busy", "FLOPs a byte of L2", f"useful at T = {LENGTH}"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rows = []
    for kernel, width in SHAPES:
        rows.append(row(kernel, width, flags.ptxas))
        print_row(rows[-1])
    print(f"\nFLOPs a byte of memory at T = {LENGTH}; above {SUSTAINED / BANDWIDTH:.0f} arithmetic is the limit:")
    print(", ".join(f"{kernel} {n * LENGTH / (2 * ARRAYS[kernel]):.0f}" for kernel, n in PRODUCTS.items()))
    if flags.json:
        flags.json.write_text(json.dumps({"ptxas": version, "length": LENGTH, "rows": rows}, indent=1) + "\n")
    return 1 if any(r["spilled_bytes"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
