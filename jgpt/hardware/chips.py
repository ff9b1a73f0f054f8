"""The known kinds of device, one record each: all that jgpt knows of a device before it runs on it.

Beside the data path: `devices.py` finds the record of a device that is here, `planning/` those of devices that are not.
To add a GPU, add a record to GPUS; for plans on machines without that GPU, also add its file to `planning/devices/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jgpt.wording import GIB

# Where nothing was measured: the shares of the data sheet that large products and copies commonly reach, and a link.
_SHARE_OF_FLOPS, _SHARE_OF_BANDWIDTH, _LINK = 0.6, 0.8, 4e9
NETWORK = 12.5e9  # bytes a second between hosts: 100 Gbit/s Ethernet
# From one short kernel to the next on a GPU's stream, one launched behind the other: 3.8 us on a V100 (A. Gray,
# "Getting Started with CUDA Graphs", NVIDIA's developer blog, 2019), rounded. A slower CPU launches them later.
LAUNCH_SECONDS = 4e-6


@dataclass(frozen=True)
class Rates:
    """What a device sustains: FLOP/s of GEMMs with 16-bit and other operands, bytes/s of its memory and of its link.

    `link` goes to the other devices of its host. `network` is what a host sends to other hosts, all its devices
    together. `launch` is the least that a kernel takes, in seconds: the time to launch it.
    """

    fp16_flops: float
    fp32_flops: float
    bandwidth: float
    link: float
    network: float = NETWORK
    launch: float = LAUNCH_SECONDS


@dataclass(frozen=True)
class Chip:
    """One kind of device; None where something is not known.

    `pattern` is a regular expression for JAX's `device_kind`; `compute_capability` is NVIDIA's (major, minor).
    `peak_flops` maps "fp32", "fp16", "bf16" to the most floating-point operations a second that a matrix product of
    such arrays can reach in JAX, without sparsity and with fp32 sums. `memory_bytes` is the memory of the card,
    `usable_bytes` what CUDA or libtpu leaves of it (all of it where nobody has looked), `memory_bandwidth` its bytes a
    second. `rates` are what a prediction assumes. `target_file` names the file in `planning/devices/` to compile with.
    `matrix_side` is the side of its matrix unit, where products of other sides are padded to it.
    """

    name: str
    pattern: str
    compute_capability: tuple[int, int] | None
    peak_flops: Mapping[str, float | None]
    memory_bytes: int | None
    usable_bytes: int | None
    memory_bandwidth: float | None
    rates: Rates | None
    target_file: str | None
    matrix_side: int | None = None


def unknown_chip(name: str, compute_capability: tuple[int, int] | None) -> Chip:
    """Return the record of a device that is not in the table: a CPU, another GPU or TPU."""
    peaks: dict[str, float | None] = {"fp32": None, "fp16": None, "bf16": None}
    return Chip(name, "", compute_capability, MappingProxyType(peaks), None, None, None, None, None)


def _gpu(
    name: str,
    pattern: str,
    capability: tuple[int, int],
    *,
    tflops: tuple[float, float, float],  # fp32, fp16, bf16
    gib: float,
    gb_per_second: float,
    usable_gib: float | None = None,
    rates: Rates | None = None,
    nvlink_gb_per_second: float = 0.0,  # one way
    target_file: str | None = None,
) -> Chip:
    """Build a record from the units of a data sheet; without `rates` they are shares of it."""
    link = 1e9 * _SHARE_OF_BANDWIDTH * nvlink_gb_per_second or _LINK
    single, half, brain = (1e12 * peak for peak in tflops)
    products16 = half if capability >= (7, 0) else single  # before, no tensor cores, and XLA sums fp16 products in fp32
    bandwidth = 1e9 * gb_per_second
    return Chip(
        name=name,
        pattern=pattern,
        compute_capability=capability,
        peak_flops=MappingProxyType({"fp32": single, "fp16": half, "bf16": brain}),
        memory_bytes=int(gib * GIB),
        usable_bytes=int((usable_gib or gib) * GIB),
        memory_bandwidth=bandwidth,
        rates=rates
        or Rates(_SHARE_OF_FLOPS * products16, _SHARE_OF_FLOPS * single, _SHARE_OF_BANDWIDTH * bandwidth, link),
        target_file=target_file,
    )


# NVIDIA's data sheets, dense figures (the sheets of Ampere and later print twice that, for 2:4 sparsity). fp32 is the
# TF32 tensor cores' figure from sm_80 on, because JAX multiplies fp32 matrices there by default; bf16 below sm_80 is
# the fp32 figure, because XLA converts. `usable_gib` is what deviceQuery prints as totalGlobalMem. The first pattern
# that is found in `device_kind` wins.
GPUS = (
    # T4 data sheet, 2019; usable memory as seen on Kaggle. It sustains 24 of its 65 TFLOP/s in fp16: a product of
    # 4096^3 at its 70 W (NVIDIA's answer in its developer forum, thread 264462). Estimates: fp32 three quarters of 8.1,
    # memory 80% of 320 GB/s. Two on Kaggle talk through the host: 2 to 6 GB/s are expected, 4 is assumed.
    _gpu(
        "T4", r"\bT4\b", (7, 5), tflops=(8.1, 65, 8.1), gib=16, usable_gib=14.6, gb_per_second=320, target_file="t4",
        rates=Rates(fp16_flops=24e12, fp32_flops=6e12, bandwidth=256e9, link=4e9),
    ),
    # P100 data sheet, 2016: no tensor cores, half precision at twice the fp32 rate.
    _gpu(
        "P100 PCIe", r"\bP100-PCIE", (6, 0), tflops=(9.3, 18.7, 9.3), gib=16, usable_gib=15.8, gb_per_second=732,
        target_file="p100",
    ),
    _gpu("P100 SXM2", r"\bP100-SXM", (6, 0), tflops=(10.6, 21.2, 10.6), gib=16, gb_per_second=732),
    # L4 data sheet, 2023.
    _gpu(
        "L4", r"\bL4\b", (8, 9), tflops=(60, 121, 121), gib=24, usable_gib=22.0, gb_per_second=300, target_file="l4",
    ),
    # V100 data sheet, 2020.
    _gpu("V100 PCIe", r"\bV100-PCIE", (7, 0), tflops=(14, 112, 14), gib=16, gb_per_second=900),
    _gpu("V100 SXM2", r"\bV100-SXM", (7, 0), tflops=(15.7, 125, 15.7), gib=16, gb_per_second=900),
    # A100 data sheet, 2022.
    _gpu(
        "A100 80GB PCIe", r"\bA100.*80GB.*PCIE|\bA100-PCIE-80GB", (8, 0), tflops=(156, 312, 312), gib=80,
        gb_per_second=1935,
    ),
    _gpu("A100 80GB SXM", r"\bA100.*80GB", (8, 0), tflops=(156, 312, 312), gib=80, gb_per_second=2039),
    _gpu(
        "A100 40GB", r"\bA100", (8, 0), tflops=(156, 312, 312), gib=40, usable_gib=39.4, gb_per_second=1555,
        target_file="a100",
    ),
    # A10G data sheet, 2021.
    _gpu("A10G", r"\bA10G\b", (8, 6), tflops=(35, 70, 70), gib=24, gb_per_second=600),
    # GA102 and Ada whitepapers, appendix A: GeForce tensor cores run at half rate when they sum in fp32.
    _gpu("RTX 3090", r"\bRTX 3090$", (8, 6), tflops=(35.6, 71, 71), gib=24, gb_per_second=936),
    _gpu("RTX 4090", r"\bRTX 4090$", (8, 9), tflops=(82.6, 165.2, 165.2), gib=24, gb_per_second=1008),
    # H100 data sheet, 2023, and H200 data sheet, 2024. Measured on an H100 SXM (jax 0.11.2, scripts/bench/
    # plan_vs_truth.py): GPT-2 124M takes 1.08 times the predicted seconds a step, a 34M model 1.22 times.
    _gpu("H100 PCIe", r"\bH100 PCIE", (9, 0), tflops=(378, 756, 756), gib=80, gb_per_second=2000),
    _gpu(
        "H100 SXM", r"\bH100 80GB HBM3", (9, 0), tflops=(494.7, 989.4, 989.4), gib=80, usable_gib=79.1,
        gb_per_second=3350, nvlink_gb_per_second=450, target_file="h100",
    ),
    _gpu(
        "H200 SXM", r"\bH200$", (9, 0), tflops=(494.7, 989.4, 989.4), gib=141e9 / GIB, gb_per_second=4800,
        nvlink_gb_per_second=450,
    ),
)  # fmt: skip

TPUS = (
    # Google's page of TPU v5e (cloud.google.com/tpu/docs/v5e): 197 TFLOP/s in bf16, 16 GB, 819 GB/s, of which programs
    # get 15.75 GiB (XLA's own words where one does not fit). JAX multiplies fp32 matrices in one pass of bf16 there; no
    # unit takes fp16. Plans take these rates as they are, not shares of them: the MFU is then a bound. Other work: 4
    # ALUs of 8 x 128 lanes at 1.5 GHz. Link: a chip sends 45 GB/s to a neighbour, and a ring through 2 x 4 chips uses
    # two (jax-ml.github.io/scaling-book/tpus).
    Chip(
        name="TPU v5e",
        pattern=r"\bTPU v5 lite",
        compute_capability=None,
        peak_flops=MappingProxyType({"fp32": 197e12, "fp16": None, "bf16": 197e12}),
        memory_bytes=16 * GIB,
        usable_bytes=int(15.75 * GIB),
        memory_bandwidth=819e9,
        rates=Rates(
            fp16_flops=197e12, fp32_flops=6.1e12, bandwidth=819e9, link=90e9, launch=0.0
        ),  # a step is one program
        target_file=None,
        matrix_side=128,
    ),
)
CHIPS = (*GPUS, *TPUS)
