"""The devices that a step can be planned for: those of this machine, and compile-only ones that are not here.

Beside the data path: a plan compiles for them, and asks what they hold and how fast they are. What is known of each
kind is its record in `hardware/chips.py`. The text files beside this one are what XLA must know of a GPU to compile for
it: its GpuTargetConfigProto as text, with what CUDA's deviceQuery says. TPUs are described by libtpu (`tpu.py`).
"""

import importlib.metadata
import os
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources

import jax
import jax.numpy as jnp

from jgpt.errors import UserError
from jgpt.hardware.chips import CHIPS, NETWORK, Chip, Rates
from jgpt.hardware.devices import MEMORY_SHARE, chip_of
from jgpt.parallel.hosts import own_devices
from jgpt.planning.devices.tpu import TPU_TARGETS, tpu_devices
from jgpt.wording import did_you_mean

OLDEST_JAX = (0, 10)  # that compiles a pmap for devices that are not there, and shows the program
# The name on the command line: its device file, how many on a host. Kaggle lends T4s in pairs.
TARGETS = {"t4x2": ("t4", 2), "l4x4": ("l4", 4), "h100x8": ("h100", 8)}
TARGETS |= {chip.target_file: (chip.target_file, 1) for chip in CHIPS if chip.target_file}
THIS = "this"
CUDNN_LINE = "pip install nvidia-cudnn-cu12 (600 MB; no GPU is needed)"
_CPU_MEMORY_SHARE = 0.5  # of the machine's memory, for the step: the text, the samples and other programs have theirs


@dataclass(frozen=True)
class Target:
    """Devices to plan for. `memory_bytes` is what the step may take of each, None where nobody knows."""

    name: str
    devices: list[jax.Device]
    chip: Chip
    memory_bytes: int | None
    rates: Rates | None  # None for a CPU and GPUs that are not known
    hosts: int = 1  # each with as many of the devices

    @property
    def kind(self) -> str:
        """How many of what, as "2 x T4"."""
        hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        return f"{len(self.devices)} x {self.chip.name}{hosts}"

    def constants(self) -> str:
        """Say what a prediction rests on."""
        if self.rates is None:
            return "no speed is predicted: the rates of this device are not known"
        r = self.rates
        link = f", link between devices {r.link / 1e9:g} GB/s" if len(self.devices) > self.hosts else ""
        link += f", network of a host {r.network / 1e9:g} GB/s" if self.hosts > 1 else ""
        return (
            f"predicted, not measured, with {r.fp16_flops / 1e12:.4g} TFLOP/s in 16-bit products,"
            f" {r.fp32_flops / 1e12:.3g} in others, memory {r.bandwidth / 1e9:.4g} GB/s{link}"
        )


def this_machine(devices: list[jax.Device]) -> Target:
    """Return the devices that are here as a target."""
    own = own_devices(devices)
    chip = chip_of(own[0])
    stats = own[0].memory_stats() or {} if own[0].platform != "cpu" else {}
    memory = stats.get("bytes_limit", _for_jax(chip))
    if own[0].platform == "cpu":
        memory = int(_CPU_MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(own))
    return Target(THIS, devices, chip, memory, chip.rates)


def compile_only(name: str, hosts: int = 1, network: float = NETWORK) -> Target:
    """Return devices of a kind that is not here: those of `name` on each host, which sends `network` bytes a second.

    Raises UserError for an unknown name, for several hosts of TPUs, and without the wheels.
    """
    if name in TPU_TARGETS:
        if hosts > 1:
            raise UserError(f"--hosts={hosts} with --device={name}: plans for TPUs are for one host. Take --hosts=1.")
        check_jax('pip install -U "jax[tpu]"')
        devices = tpu_devices(name)
        chip = chip_of(devices[0])
        return Target(name, devices, chip, _for_jax(chip), chip.rates)
    if name not in TARGETS:
        known = [*TARGETS, *TPU_TARGETS, THIS]
        hint = did_you_mean(name.lower(), known, cutoff=0.5)
        raise UserError(f"--device={name} is not known.{hint} Allowed: {', '.join(known)}.")
    kind, count = TARGETS[name]
    check_wheels()
    from jax.experimental import topologies  # loads nothing that training needs

    text = resources.files("jgpt.planning.devices").joinpath(f"{kind}.txt").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x{hosts}x{count}")
    devices = list(topology.devices)
    chip = chip_of(devices[0])
    rates = replace(chip.rates, network=network) if chip.rates else None
    return Target(name, devices, chip, _for_jax(chip), rates, hosts)


def _for_jax(chip: Chip) -> int | None:
    """Return what JAX takes of a device: a share of a GPU, all that libtpu leaves of a TPU."""
    share = MEMORY_SHARE if chip.compute_capability else 1.0
    return int(share * chip.usable_bytes) if chip.usable_bytes else None


def check_wheels() -> None:
    """Raise UserError, with the pip line for this JAX, where a package for compiling without a GPU is missing."""
    jaxlib = importlib.metadata.version("jaxlib")
    check_jax("pip install -U jax jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12")
    found = {name: _version(name) for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")}
    if any(there != jaxlib for there in found.values()):
        have = ", ".join(f"{name} {there or 'is missing'}" for name, there in found.items())
        raise UserError(
            f"compiling for GPUs that are not here needs JAX's CUDA wheels of jaxlib's version, {jaxlib}: {have}. No"
            f" GPU and no driver are needed. {pip_line(jaxlib)}"
        )


def check_jax(install: str) -> None:
    """Raise UserError for a JAX that compiles for no device but those that are here; `install` is what to run then."""
    version = jax.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise UserError(
            f"jax {version} cannot compile this step for devices that are not here: that needs jax {oldest} or newer. "
            f"In another environment: {install}. Or plan for the devices that are here: --device=this."
        )


def pip_line(jaxlib: str = "") -> str:
    """Return the command that installs what compiling for GPUs that are not here needs."""
    jaxlib = jaxlib or importlib.metadata.version("jaxlib")
    return f"Run: pip install jax-cuda12-plugin=={jaxlib} jax-cuda12-pjrt=={jaxlib} nvidia-cuda-nvcc-cu12"


def has_cudnn() -> bool:
    """Tell whether JAX finds cuDNN, for which it looks while it traces fused attention. No GPU is needed."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    attention = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(attention, x, x, x)
    except RuntimeError:
        return False
    return True


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
