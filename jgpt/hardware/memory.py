"""Out of memory: which errors mean it, what was asked for, and what there is.

Beside the data path: training and the commands say with it what XLA and NumPy raise.
"""

import os
import re

import jax

from jgpt.hardware.devices import local_devices
from jgpt.wording import gib

# XLA says it in many ways: its allocators (as RESOURCE_EXHAUSTED, or on a CPU of jax 0.7 as INTERNAL), its constants,
# CUDA graphs, cuBLAS and cuDNN, and a TPU's compiler ("Ran out of memory in memory space hbm"). A full disk and a
# kernel's shared memory are other matters.
_SIGNS = r"out of memory|RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY|_STATUS_ALLOC_FAILED|failed to allocate"
_OTHERS = r"no space left|shared memory|memory space [sv]mem"  # the last: a TPU kernel's own scratch
_AMOUNT = r"([\d.]+) ?([KMGTPE]iB|bytes)"
_LARGEST = r"Buffer 1:\s+Size: (\S+)(?:\s+Operator: op_name=\"([^\"]+)\")?"  # of XLA's list of a program's arrays
_UNITS = {"bytes": 1} | {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTPE", 1)}


def tpu_program_bytes(text: str) -> int | None:
    """Return what a program takes of a TPU chip, from the words with which its compiler refuses it, else None."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", text)
    return int(float(found[1]) * _UNITS[f"{found[2]}iB"]) if found else None


def shortage(error: BaseException | None, device: jax.Device | None = None) -> str:
    """Say in a sentence what was asked for and what there is; "" where neither an error nor its cause is about memory.

    `device` is where the work was (the first one where that is not known); a CPU has the machine's own memory.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError):
            return f"the machine {_asked(text)}, and has {_host()}"
        if isinstance(error, jax.errors.JaxRuntimeError) and _means_memory(text):
            where = local_devices()[0] if device is None else device
            has = _host() if where.platform == "cpu" else _on(where)
            return f"the {where.device_kind} {_asked(text)}, and has {has}"
        error = error.__cause__
    return ""


def _means_memory(text: str) -> bool:
    return bool(re.search(_SIGNS, text, re.IGNORECASE)) and not re.search(_OTHERS, text, re.IGNORECASE)


def _asked(text: str) -> str:
    """Read from a message what was asked for, in one piece, and by what."""
    if taken := tpu_program_bytes(text):
        return f"was asked for {gib(taken)} by one program"
    found = re.search(_AMOUNT, text)
    asked = f"was asked for {gib(float(found[1]) * _UNITS[found[2]])} in one piece" if found else "ran out of memory"
    if array := re.search(r"for an array with shape .*", text):  # NumPy's
        return f"{asked} {array[0].rstrip('.')}"
    parts = []
    if total := re.search(r"total allocation:\s+(\S+)", text):
        parts.append(f"the program takes {total[1]} in all")
    if largest := re.search(_LARGEST, text):
        parts.append(f"its largest array {largest[1]}" + (f" in {largest[2]}" if largest[2] else ""))
    return asked + (f" ({', '.join(parts)})" if parts else "")


def _on(device: jax.Device) -> str:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return "less than that free"
    taken = f"{gib(stats['bytes_limit'])} for JAX, of which {gib(stats['bytes_in_use'])} are taken"
    free = stats.get("largest_free_block_bytes")  # less than all that is free, where memory is in fragments
    return f"{taken} and {gib(free)} the largest free piece" if free else taken


def _host() -> str:
    if not hasattr(os, "sysconf"):  # Windows
        return "less than that free"
    pages = {name: os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")}
    return f"{gib(pages['SC_PHYS_PAGES'])} of memory, of which {gib(pages['SC_AVPHYS_PAGES'])} are free"
