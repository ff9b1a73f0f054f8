"""The texts that a model wrote while it trained: samples.txt, and back.

In the data path: after decoding, into the run directory; the report reads them.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jgpt.atomic_write import write_file
from jgpt.redaction import redact

_HEADER = re.compile(r"^=== step ([0-9]{1,18})\b.*, sample \d+ of \d+ ===\n", re.MULTILINE)
_LOOKS_LIKE_HEADER = re.compile(r"^(?=\\*=== step )", re.MULTILINE)


class Sample(NamedTuple):
    """A text of samples.txt, the line above it, and the step that it was made at."""

    step: int
    header: str
    text: str


def append_samples(path: Path, step: int, val_loss: float | None, texts: Sequence[str]) -> None:
    """Append the texts, each under a header line, and no secret in them.

    A line of theirs that could pass for a header gets a backslash first.
    """
    with path.open("a", encoding="utf-8", errors="replace", newline="") as file:
        for i, text in enumerate(texts, 1):
            loss = "" if val_loss is None else f", validation loss {val_loss:.4f}"
            file.write(f"=== step {step}{loss}, sample {i} of {len(texts)} ===\n")
            file.write(_LOOKS_LIKE_HEADER.sub(r"\\", redact(text)) + "\n\n")


def read_samples(path: Path) -> list[Sample]:
    """Read samples.txt back, as the texts were; no file is an empty list."""
    text = _read(path)
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers), len(text)][1:]
    return [
        Sample(
            int(header[1]),
            header[0].strip("= \n"),
            re.sub(r"^\\(?=\\*=== step )", "", text[header.end() : end].removesuffix("\n\n"), flags=re.MULTILINE),
        )
        for header, end in zip(headers, ends, strict=True)
    ]


def drop_samples_after(path: Path, step: int) -> None:
    """Forget the samples of later steps, which a killed run made after the checkpoint that this one resumes from."""
    text = _read(path)
    later = [header.start() for header in _HEADER.finditer(text) if int(header[1]) > step]
    if later:  # steps only rise, so that all after the first of them is later as well
        write_file(path, text[: later[0]])


def _read(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.read()
