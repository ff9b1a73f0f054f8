"""The devices that a step can be planned for: those of this machine, and compile-only ones that are not here.

Beside the data path: a plan compiles for them, and asks what they hold and how fast they are. All numbers that a
prediction rests on stand here, each with its reason; `planning/roofline.py` has the rules. The files beside this one
are what XLA must know of a GPU to compile for it: its GpuTargetConfigProto as text, with what CUDA's deviceQuery says.
"""

import difflib
import importlib.metadata
import os
from dataclasses import dataclass
from importlib import resources

import jax

from jgpt.errors import UserError
from jgpt.hardware.devices import MEMORY_SHARE, Chip, describe
from jgpt.planning.roofline import Rates

OLDEST_JAX = (0, 10)  # that compiles a pmap for devices that are not there, and shows the program
TARGETS = {"t4x2": ("t4", 2), "t4": ("t4", 1), "p100": ("p100", 1), "l4": ("l4", 1), "a100": ("a100", 1)}
TARGETS |= {"h100": ("h100", 1)}  # the name: its device file, how many
THIS = "this"
# What CUDA leaves of the card's memory, in GiB: deviceQuery's totalGlobalMem, of the T4 what is seen on Kaggle.
_MEMORY_GIB = {"t4": 14.6, "p100": 15.8, "l4": 22.0, "a100": 39.4, "h100": 79.1}
_CPU_MEMORY_SHARE = 0.5  # of the machine's memory, for the step: the text, the samples and other programs have theirs
# A T4 sustains 24 of its 65 TFLOP/s in fp16: a product of 4096^3 at its 70 W (NVIDIA's answer in its developer forum,
# thread 264462). fp32 three quarters of 8.1, memory 80% of 320 GB/s: estimates. Two on Kaggle talk through the host: 2
# to 6 GB/s are expected, 4 is assumed.
_T4_RATES = Rates(fp16_flops=24e12, fp32_flops=6e12, bandwidth=256e9, link=4e9)
# Of the others nothing was measured here: shares of the data sheet that large products and copies commonly reach.
_SUSTAINED, _BANDWIDTH, _LINK = 0.6, 0.8, 4e9


@dataclass(frozen=True)
class Target:
    """Devices to plan for. `memory_bytes` is what the step may take of each, None where nobody knows."""

    name: str
    devices: list[jax.Device]
    chip: Chip
    memory_bytes: int | None
    rates: Rates | None  # None for a CPU and GPUs that are not known

    @property
    def kind(self) -> str:
        """How many of what, as "2 x T4"."""
        return f"{len(self.devices)} x {self.chip.name}"

    def constants(self) -> str:
        """Say what a prediction rests on."""
        if self.rates is None:
            return "no speed is predicted: the rates of this device are not known"
        r = self.rates
        link = f", link between devices {r.link / 1e9:g} GB/s" if len(self.devices) > 1 else ""
        return (
            f"predicted, not measured, with {r.fp16_flops / 1e12:.4g} TFLOP/s in 16-bit products,"
            f" {r.fp32_flops / 1e12:.3g} in others, memory {r.bandwidth / 1e9:.4g} GB/s{link}"
        )


def this_machine(devices: list[jax.Device]) -> Target:
    """Return the devices that are here as a target."""
    chip = describe(devices[0])
    stats = devices[0].memory_stats() or {} if devices[0].platform != "cpu" else {}
    memory = stats.get("bytes_limit", chip.memory_bytes and int(MEMORY_SHARE * chip.memory_bytes))
    if devices[0].platform == "cpu":
        memory = int(_CPU_MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices))
    return Target(THIS, devices, chip, memory, sustained_rates(chip))


def compile_only(name: str) -> Target:
    """Return devices of a kind that is not here. Raises UserError for a name that is none, and without the wheels."""
    if name not in TARGETS:
        known = [*TARGETS, THIS]
        close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"--device={name} is not known.{hint} Allowed: {', '.join(known)}.")
    kind, count = TARGETS[name]
    check_wheels()
    from jax.experimental import topologies  # loads nothing that training needs

    text = resources.files("jgpt.planning.devices").joinpath(f"{kind}.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{count}")
    devices = list(topology.devices)
    chip = describe(devices[0])
    return Target(name, devices, chip, int(MEMORY_SHARE * _MEMORY_GIB[kind] * 2**30), sustained_rates(chip))


def sustained_rates(chip: Chip) -> Rates | None:
    """Return what a known GPU sustains; None for others."""
    peaks = chip.peak_flops
    half, single, bandwidth = peaks["fp16"], peaks["fp32"], chip.memory_bandwidth
    if half is None or single is None or bandwidth is None:
        return None
    if chip.name == "T4":
        return _T4_RATES
    if chip.compute_capability and chip.compute_capability < (7, 0):
        half = single  # no tensor cores, and XLA sums fp16 products in fp32
    return Rates(_SUSTAINED * half, _SUSTAINED * single, _BANDWIDTH * bandwidth, _LINK)


def check_wheels() -> None:
    """Refuse to compile for GPUs that are not here without what that takes, each with the pip line for this JAX."""
    version, jaxlib = jax.__version__, importlib.metadata.version("jaxlib")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UserError(
            f"jax {version} cannot compile this step for devices that are not here: that takes jax {oldest} or newer. "
            "In an environment of its own: pip install -U jax jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12. "
            "Or plan for the devices that are here: --device=this."
        )
    found = {name: _version(name) for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")}
    if any(there != jaxlib for there in found.values()):
        have = ", ".join(f"{name} {there or 'is missing'}" for name, there in found.items())
        raise UserError(
            f"to compile for GPUs that are not here takes JAX's CUDA wheels of jaxlib's version, {jaxlib}: {have}. No"
            f" GPU and no driver are needed. {pip_line(jaxlib)}"
        )


def pip_line(jaxlib: str = "") -> str:
    """Say how to install what compiling for GPUs that are not here takes."""
    jaxlib = jaxlib or importlib.metadata.version("jaxlib")
    return f"Run: pip install jax-cuda12-plugin=={jaxlib} jax-cuda12-pjrt=={jaxlib} nvidia-cuda-nvcc-cu12"


def compile_for(target: Target, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile; raise UserError where the assembler that XLA calls for it is missing, or too old or new for the GPU."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        if target.name == THIS or not any(tool in reason for tool in ("ptxas", "PTX", "libdevice")):
            raise
        raise UserError(
            f"XLA found no assembler (ptxas) and libdevice that compile for {target.chip.name}: {reason}. NVIDIA's "
            f"wheel of them is enough. {pip_line()}"
        ) from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
