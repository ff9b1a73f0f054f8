"""The TPU chips in this machine, as Linux lists them, whatever JAX sees.

Beside the data path: `jgpt.check_env` compares the two. Only the standard library is imported.
"""

from contextlib import suppress
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
# Google's numbers of its chips, as in jax/_src/hardware_utils.py: TPU v3, v4, v5p, v5e, v6e, 7x.
TPUS = {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def tpu_chips() -> int:
    """Count the TPU chips on the PCI bus."""
    return sum(_read(folder / "vendor") == GOOGLE and _read(folder / "device") in TPUS for folder in _folders())


def _folders() -> list[Path]:
    with suppress(OSError):  # not Linux
        return list(PCI_DEVICES.iterdir())
    return []


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
