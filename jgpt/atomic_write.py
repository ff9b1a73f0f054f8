"""Write a file whole or not at all.

Beside the data path: everything that jgpt writes goes through here, so that a killed process leaves no half file.
"""

import os
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all: a temporary name, flushed, renamed. Text is UTF-8."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
