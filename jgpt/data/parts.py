"""Tokens in parts, which become one token directory: of one process, or of several at once, each with some files.

In the data path: below `write_tokens.py`, which writes the parts. A part is a range of the sorted files, and what is in
it does not depend on the others; so any number of parts gives the same stream of tokens.

    DIRECTORY/tokenizer/         of all parts
    DIRECTORY/parts/plan.json    what is made: in how many parts, of which text, with which settings
    DIRECTORY/parts/2-of-4/      the token files of a part, and part.json once it is complete

Joining renames the files into DIRECTORY, writes meta.json and removes parts/. Killed in between, it is repeated.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jgpt.atomic_write import atomic_file, remove_leftovers
from jgpt.data.token_directory import read_signed, write_signed, write_token_meta
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.write_shards import hash_stream, hashes_of, shard_name
from jgpt.errors import UserError

COPY_BYTES = 1 << 20
PARTS, PLAN, COMPLETE = "parts", "plan.json", "part.json"
MOST_PARTS = 10_000  # whoever completes one looks at all
SUMS = ("train_bytes", "val_bytes", "n_documents", "replaced_characters")


class Part(NamedTuple):
    """One of the parts that a text is prepared in."""

    index: int
    n: int

    def __str__(self) -> str:
        return f"{self.index}/{self.n}"


ALL = Part(0, 1)


def parse_part(text: str) -> Part:
    """Read "2/4", the third of four parts; raise UserError for anything else."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if part.index >= part.n:
        last = f"0/{part.n} to {part.n - 1}/{part.n}" if part.n else "0/4, 1/4, 2/4 and 3/4 for four parts"
        raise UserError(f"--shard={text}: it must be INDEX/NUMBER, where the first index is 0. Allowed: {last}.")
    if part.n > MOST_PARTS:
        raise UserError(
            f"--shard={text}: there are at most {MOST_PARTS:,} shards. Each has whole files, so more than there are"
            " files make nothing faster. Use as many as you have processor cores."
        )
    return part


def range_of(sizes: list[int], part: Part) -> range:
    """Return which files, in their order, are a part's: those whose middle byte is in its share of all bytes.

    >>> [list(range_of([50, 10, 10, 10, 70, 50], Part(i, 2))) for i in range(2)]
    [[0, 1, 2, 3], [4, 5]]
    """
    total, before, owners = sum(sizes), 0, []
    for size in sizes:
        owners.append(min(part.n - 1, part.n * (2 * before + size) // max(2 * total, 1)))
        before += size
    mine = [i for i, owner in enumerate(owners) if owner == part.index]
    return range(mine[0], mine[-1] + 1) if mine else range(0)


def part_directory(directory: Path, part: Part) -> Path:
    """Return where the files of a part are until all are joined."""
    return directory / PARTS / f"{part.index}-of-{part.n}"


def read_plan(directory: Path) -> dict[str, Any]:
    """Return the plan of the parts that are being made; {} where there is none."""
    return read_signed(directory / PARTS / PLAN)


def write_plan(directory: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Write the plan of new parts, in the place of the one before; return it as `read_plan` does."""
    remove_parts(directory)
    (directory / PARTS).mkdir(exist_ok=True)
    write_signed(directory / PARTS / PLAN, plan)
    return read_plan(directory)


def remove_parts(directory: Path) -> None:
    """Remove all parts: the plan first, so that no part counts any more."""
    (directory / PARTS / PLAN).unlink(missing_ok=True)
    for folder in (directory / PARTS).glob("*-of-*"):
        shutil.rmtree(folder, ignore_errors=True)
    remove_leftovers(directory / PARTS)
    with suppress(OSError):
        (directory / PARTS).rmdir()


def plan_difference(plan: dict[str, Any], mine: dict[str, Any]) -> str:
    """Say how the parts that a directory holds differ from those that this process would make; "" where they agree."""
    if plan["n_parts"] != mine["n_parts"]:
        return f"they are {plan['n_parts']} parts, and --shard says {mine['n_parts']}"
    theirs = plan["settings"]
    if changed := [key for key, value in mine["settings"].items() if theirs.get(key) != value]:
        return "; ".join(f"{key} is {theirs.get(key)!r} there, and {mine['settings'][key]!r} here" for key in changed)
    if plan["meta"]["fingerprint"] != mine["meta"]["fingerprint"]:
        there, here = (f"{p['meta']['n_files']:,} files with {p['n_bytes']:,} bytes" for p in (plan, mine))
        what = f"it is {there} there, and {here} here" if there != here else "a name or a time of change differs"
        return f"the text is not the same ({what})"
    return ""


def all_parts(plan: dict[str, Any]) -> list[Part]:
    """Return the parts of a plan, in their order."""
    return [Part(index, plan["n_parts"]) for index in range(plan["n_parts"])]


def complete_part(directory: Path, plan: dict[str, Any], part: Part, entries: dict[str, Any]) -> None:
    """Note that the files of a part are written; `entries` say what is in them."""
    write_signed(part_directory(directory, part) / COMPLETE, {"plan": plan["meta_sha256"]} | entries)


def is_complete(directory: Path, plan: dict[str, Any], part: Part) -> bool:
    """Return whether the files of a part were written."""
    return bool(_read_part(directory, plan, part))


def _read_part(directory: Path, plan: dict[str, Any], part: Part) -> dict[str, Any]:
    found = read_signed(part_directory(directory, part) / COMPLETE)
    return found if found.get("plan") == plan["meta_sha256"] else {}


def join_parts(directory: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> list[Part]:
    """Make one token directory of all parts, and return []; where some are missing, return those.

    A part whose files are not what was written is missing. Whoever calls holds the directory. Raises UserError when all
    parts together hold no text.
    """
    found = {part: _read_part(directory, plan, part) for part in all_parts(plan)}
    if missing := [part for part in found if not found[part]]:
        return missing
    streams = {
        split: [_Piece(part, shard, 0, shard["bytes"]) for part in found for shard in found[part][f"{split}_shards"]]
        for split in ("train", "val")
    }
    n_train, n_val = (sum(piece.end for piece in stream) for stream in streams.values())
    if not n_train + n_val:
        remove_parts(directory)
        raise UserError(
            f"the {plan['meta']['n_files']} files that data.text_glob matches hold no text. Training needs some. "
            "Set data.text_glob to files that are not empty."
        )
    first, fraction = found[Part(0, plan["n_parts"])], plan["settings"]["data.val_fraction"]
    is_text, itemsize = first["format"] == "text", np.dtype(first["dtype"]).itemsize
    by_position = is_text and not fraction / 2 <= n_val / (n_train + n_val) <= fraction * 2
    if by_position:  # few documents of unequal size
        n_tokens = (n_train + n_val) // itemsize
        streams = _cut([*streams["train"], *streams["val"]], (n_tokens - round(n_tokens * fraction)) * itemsize)
    targets = {split: [directory / shard_name(split, i) for i in range(len(streams[split]))] for split in streams}
    moves = [move for split in streams for move in zip(streams[split], targets[split], strict=True)]
    if damaged := {piece.part for piece, target in moves if not piece.is_there(directory, target)}:
        for part in damaged:
            (part_directory(directory, part) / COMPLETE).unlink(missing_ok=True)
        return sorted(damaged)

    entries = {key: value for key, value in first.items() if key not in ("plan", "meta_sha256")}
    entries |= {key: sum(part[key] for part in found.values()) for key in SUMS}
    for split, pieces in streams.items():
        shards = [piece.move(directory, target) for piece, target in zip(pieces, targets[split], strict=True)]
        entries |= {f"{split}_shards": shards, f"{split}_tokens": sum(shard["bytes"] for shard in shards) // itemsize}
    # What a run remembers its text by: whatever the shards are, it is the same.
    one = entries["train_shards"][0]["sha256"] if len(targets["train"]) == 1 else ""
    entries["train_sha256"] = one or hash_stream(targets["train"])
    if is_text:
        entries["split"] = "position" if by_position else "document"
    if by_position:
        val_bytes = sum(_text_bytes(path, np.dtype(first["dtype"]), tokenizer) for path in targets["val"])
        entries |= {"train_bytes": entries["train_bytes"] + entries["val_bytes"] - val_bytes, "val_bytes": val_bytes}
    write_token_meta(directory, plan["meta"] | entries)
    remove_parts(directory)
    return []


class _Piece(NamedTuple):
    """What a part has for one of the files of the token directory: a file of its own, or bytes of it."""

    part: Part
    shard: dict[str, Any]  # its entry in part.json
    begin: int
    end: int

    def is_whole(self) -> bool:
        return (self.begin, self.end) == (0, self.shard["bytes"])

    def source(self, directory: Path) -> Path:
        return part_directory(directory, self.part) / self.shard["file"]

    def is_there(self, directory: Path, target: Path) -> bool:
        """Return whether the file has its size, or is in its place already, as joining was killed before."""
        source = self.source(directory)
        path = target if self.is_whole() and not source.exists() else source
        return path.exists() and path.stat().st_size == self.shard["bytes"]

    def move(self, directory: Path, target: Path) -> dict[str, Any]:
        """Put the bytes into their place, and return the entry of meta.json."""
        source = self.source(directory)
        if self.is_whole():
            if source.exists():
                source.replace(target)
            return self.shard | {"file": target.name}
        with source.open("rb") as file, atomic_file(target, "w+b") as copy:
            file.seek(self.begin)
            n_left = self.end - self.begin
            while block := file.read(min(n_left, COPY_BYTES)):
                n_left -= copy.write(block)
            return {"file": target.name} | hashes_of(copy)


def _cut(pieces: list[_Piece], n_train: int) -> dict[str, list[_Piece]]:
    """Cut a stream after its first `n_train` bytes."""
    streams: dict[str, list[_Piece]] = {"train": [], "val": []}
    for piece in pieces:
        cut = min(max(n_train, 0), piece.end)
        if cut > 0:
            streams["train"].append(piece._replace(end=cut))
        if cut < piece.end:
            streams["val"].append(piece._replace(begin=cut))
        n_train -= piece.end
    return streams


def _text_bytes(path: Path, dtype: np.dtype, tokenizer: Tokenizer) -> int:
    """Count the UTF-8 bytes of a file's text, to within a few bytes for each chunk that ends inside a character."""
    n_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 18):
            ids = np.frombuffer(chunk, dtype)
            n_bytes += len(tokenizer.decode(ids[ids != tokenizer.eot_id]).encode())
    return n_bytes
