"""The devices that are here: which kind each is, its compute capability, its free memory, the dtypes that suit it.

Beside the data path: training and loading ask for the precision policy, and the metrics for the peak that a step's
speed is measured by. What is known of each kind stands in `chips.py`.
"""

import re
from dataclasses import replace

import jax

from jgpt.hardware.chips import CHIPS, Chip, unknown_chip
from jgpt.model.precision import Policy, choose_policy

MEMORY_SHARE = 0.92  # of a GPU's memory that JAX takes; it needs the rest for itself and CUDA


def local_devices() -> list[jax.Device]:
    """Return the devices of this process; nobody else asks JAX for them."""
    return jax.local_devices()


def all_devices() -> list[jax.Device]:
    """Return the devices of all processes of the run, those of a process side by side; of one, its own."""
    return sorted(jax.devices(), key=lambda device: device.process_index)


def chip_of(device: jax.Device) -> Chip:
    """Return the record of a device's kind; that of a CPU or an unknown GPU or TPU has little more than a name."""
    kind, capability = device.device_kind, compute_capability(device)
    for chip in CHIPS:
        # A slice of a card (MIG) has its card's name in its own, and not its speed.
        if re.search(chip.pattern, kind, re.IGNORECASE) and "MIG" not in kind:
            return replace(chip, compute_capability=capability or chip.compute_capability)
    return unknown_chip(kind, capability)


def compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """Return NVIDIA's compute capability, (7, 5) for a T4; None for other devices."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # other devices lack it
    return (int(found[1]), int(found[2])) if found else None


def choose_device_policy(compute: str, params: str, device: jax.Device) -> Policy:
    """Return the policy that `precision.compute` and `precision.params` mean on a device. Raises UserError."""
    return choose_policy(compute, params, device.platform, compute_capability(device))


def free_memory(device: jax.Device) -> int | None:
    """Return the bytes that JAX can still allocate on a device; None for a CPU, which has the machine's memory.

    Where the allocator does not say, it is all that CUDA leaves of the card.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return chip_of(device).usable_bytes
