"""Read what the doctor's tools print, and put its report into words; nothing here needs a device or JAX.

Beside the data path: `doctor.py` uses it on Kaggle, and the verb `doctor` on the laptop.
"""

import re
from typing import Any

# The name of each quantity in the report, and in nvidia-smi.
CLOCKS = {"sm_mhz": "clocks.sm", "watts": "power.draw", "celsius": "temperature.gpu"}


def in_short(value: Any) -> str:
    """Return a part of the report as one line, with rounded numbers.

    >>> in_short({"flops": [2.4e13, 2.3123e13], "correct": True})
    'flops 2.4e+13 2.31e+13, correct True'
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(in_short(item) for item in value) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def transport(log: str) -> str | None:
    """Find in NCCL's log the transport of its channels.

    >>> transport("host:7:9 [0] NCCL INFO Channel 00/0 : 0[40] -> 1[50] via SHM/direct/direct")
    'SHM/direct/direct'
    """
    return ", ".join(sorted(set(re.findall(r"Channel .* via (\S+)", log)))) or None


def clock_summary(lines: list[str]) -> dict[str, Any]:
    """Return least, mean and most of each quantity by GPU.

    >>> clock_summary(["0, 585, 30.1, 40", "0, 1590, 69.9, 60"])
    {'0': {'sm_mhz': [585.0, 1087.5, 1590.0], 'watts': [30.1, 50.0, 69.9], 'celsius': [40.0, 50.0, 60.0]}}
    """
    by_gpu: dict[str, list[list[float]]] = {}
    for line in lines:
        gpu, *values = line.split(", ")
        if all(re.fullmatch(r"[\d.]+", value) for value in values):  # not "[N/A]"
            by_gpu.setdefault(gpu, []).append([float(value) for value in values])
    return {
        gpu: {
            name: [min(column), sum(column) / len(column), max(column)]
            for name, column in zip(CLOCKS, zip(*rows, strict=True), strict=True)
        }
        for gpu, rows in by_gpu.items()
    }


def with_share(training: dict[str, Any], matmul: dict[str, Any]) -> dict[str, Any]:
    """Add the share of the speed of matrix products (all devices together) that a training step reaches."""
    together = matmul.get(f"{training.get('compute')}_together")
    return training | {"share_of_matmul": training["flops"] / sum(together)} if together else training
