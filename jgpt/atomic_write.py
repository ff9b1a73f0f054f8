"""Write a file whole or not at all.

Beside the data path: everything that jgpt writes goes through here, so that a killed process leaves no half file.
"""

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all: a temporary name, flushed, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
