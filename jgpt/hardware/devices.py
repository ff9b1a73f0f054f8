"""The devices that a run uses: what they are, what they can do at most.

Beside the data path: the precision policy asks for their compute capability, and the metrics for the peak that a step's
speed is measured by.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import jax

from jgpt.wording import GIB

MEMORY_SHARE = 0.92  # of a GPU's memory that JAX takes; it needs the rest for itself and CUDA


@dataclass(frozen=True)
class Chip:
    """One device as its maker describes it; None where that is not known.

    `compute_capability` is NVIDIA's (major, minor). `peak_flops` maps "fp32", "fp16", "bf16" to the most
    floating-point operations a second that a matrix product of such arrays can reach in JAX, without sparsity and with
    fp32 sums. `memory_bytes` is the memory of the card, `memory_bandwidth` its bytes a second.
    """

    name: str
    compute_capability: tuple[int, int] | None
    peak_flops: Mapping[str, float | None]
    memory_bytes: int | None
    memory_bandwidth: float | None


def _chip(name: str, capability: tuple[int, int], tflops: tuple[float, float, float], gib: float, gb_s: float) -> Chip:
    """Build a row of the table from TFLOP/s in fp32, fp16 and bf16, GiB, and GB/s."""
    peaks = {dtype: 1e12 * peak for dtype, peak in zip(("fp32", "fp16", "bf16"), tflops, strict=True)}
    return Chip(name, capability, MappingProxyType(peaks), int(gib * GIB), 1e9 * gb_s)


_UNKNOWN_PEAKS: Mapping[str, float | None] = MappingProxyType({"fp32": None, "fp16": None, "bf16": None})
# NVIDIA's data sheets, dense figures (the sheets of Ampere and later print twice that, for 2:4 sparsity). fp32 is the
# TF32 tensor cores' figure from sm_80 on, because JAX multiplies fp32 matrices there by default; bf16 below sm_80 is
# the fp32 figure, because XLA converts. The first pattern that is found in JAX's `device_kind` wins.
_KNOWN_GPUS = (
    # T4 data sheet, 2019: 16 GB, of which CUDA leaves about 14.6 GiB; at its 70 W it sustains some 24 TFLOP/s in fp16.
    (r"\bT4\b", _chip("T4", (7, 5), (8.1, 65, 8.1), 14.6, 320)),
    # P100 data sheet, 2016: no tensor cores, half precision at twice the fp32 rate.
    (r"\bP100-PCIE", _chip("P100 PCIe", (6, 0), (9.3, 18.7, 9.3), 16, 732)),
    (r"\bP100-SXM", _chip("P100 SXM2", (6, 0), (10.6, 21.2, 10.6), 16, 732)),
    # V100 data sheet, 2020.
    (r"\bV100-PCIE", _chip("V100 PCIe", (7, 0), (14, 112, 14), 16, 900)),
    (r"\bV100-SXM", _chip("V100 SXM2", (7, 0), (15.7, 125, 15.7), 16, 900)),
    # A100 data sheet, 2022.
    (r"\bA100.*80GB.*PCIE|\bA100-PCIE-80GB", _chip("A100 80GB PCIe", (8, 0), (156, 312, 312), 80, 1935)),
    (r"\bA100.*80GB", _chip("A100 80GB SXM", (8, 0), (156, 312, 312), 80, 2039)),
    (r"\bA100", _chip("A100 40GB", (8, 0), (156, 312, 312), 40, 1555)),
    # A10G data sheet, 2021.
    (r"\bA10G\b", _chip("A10G", (8, 6), (35, 70, 70), 24, 600)),
    # GA102 and Ada whitepapers, appendix A: GeForce tensor cores run at half rate when they sum in fp32.
    (r"\bRTX 3090$", _chip("RTX 3090", (8, 6), (35.6, 71, 71), 24, 936)),
    (r"\bRTX 4090$", _chip("RTX 4090", (8, 9), (82.6, 165.2, 165.2), 24, 1008)),
    # L4 data sheet, 2023.
    (r"\bL4\b", _chip("L4", (8, 9), (60, 121, 121), 24, 300)),
    # H100 data sheet, 2023, and H200 data sheet, 2024.
    (r"\bH100 PCIE", _chip("H100 PCIe", (9, 0), (378, 756, 756), 80, 2000)),
    (r"\bH100 80GB HBM3", _chip("H100 SXM", (9, 0), (494.7, 989.4, 989.4), 80, 3350)),
    (r"\bH200$", _chip("H200 SXM", (9, 0), (494.7, 989.4, 989.4), 141e9 / GIB, 4800)),
)


def describe(device: jax.Device) -> Chip:
    """Look the device up in the table of known GPUs; a CPU or an unknown GPU has a name, and no peaks."""
    kind, capability = device.device_kind, compute_capability(device)
    for pattern, chip in _KNOWN_GPUS:
        # A slice of a card (MIG) has its card's name in its own, and not its speed.
        if re.search(pattern, kind, re.IGNORECASE) and "MIG" not in kind:
            return replace(chip, compute_capability=capability or chip.compute_capability)
    return Chip(kind, capability, _UNKNOWN_PEAKS, None, None)


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """Return NVIDIA's compute capability, (7, 5) for a T4; None for other devices."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # other devices lack it
    return (int(found[1]), int(found[2])) if found else None


def free_memory(device: jax.Device) -> int | None:
    """Return the bytes that JAX can still allocate on a device; None for a CPU, which has the machine's memory.

    Where the allocator does not say, all of the card counts, as its maker describes it.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return describe(device).memory_bytes
