"""Find the files that globs name: each real file once, and nothing left out without a word.

In the data path: the beginning; next is `corpus.py`.
"""

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from jgpt.data.remote import RemoteFile, TextFile, find_remote, is_remote
from jgpt.errors import UserError

PACKED = (".gz", ".zst", ".bz2", ".xz")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".ndjson")
JSON_LINES = tuple(lines + packed for lines in (".jsonl", ".ndjson") for packed in ("", *PACKED))
SUFFIXES = {  # by data.format
    "text": (*(text + packed for text in TEXT_SUFFIXES for packed in ("", *PACKED)), ".parquet"),
    "chat": JSON_LINES,
}
KNOWN = SUFFIXES["text"]
SUPPORTED = {
    "text": f"{', '.join(TEXT_SUFFIXES)}, each also with {', '.join(PACKED)}, and .parquet; any other suffix that the "
    "glob names is read as plain text",
    "chat": ".jsonl or .ndjson, also with .gz, .zst, .bz2 or .xz, as data.format is 'chat' (to convert .parquet: "
    'python -c "import json, pyarrow.parquet as p; '
    "[print(json.dumps(row)) for row in p.read_table('OLD.parquet').to_pylist()]\" > NEW.jsonl; a .json with one list: "
    "python -c \"import json; [print(json.dumps(row)) for row in json.load(open('OLD.json', encoding='utf-8'))]\""
    " > NEW.jsonl)",
}
RUN_FILES = ("config.json", "versions.json", "metrics.jsonl")  # at the top of every run directory
log = logging.getLogger("jgpt")


def find_files(text_glob: str, format: str = "text") -> list[TextFile]:
    """List the files that comma-separated globs or directories name: absolute paths, sorted, each real file once.

    What addresses such as gs://BUCKET/FOLDER/*.jsonl name comes after the local files.

    `format` is data.format; "chat" takes only JSON lines. Files that a run wrote (samples.txt) are left out, unless the
    name leads into the run directory. A line of the log counts what is left out. As in a shell, a "*" stands for no
    name that begins with a dot. Raises UserError when a glob matches no file of a supported kind, and for a folder that
    cannot be listed.
    """
    files: set[str] = set()
    remote: set[RemoteFile] = set()
    left_out: Counter[str] = Counter()
    is_run = cache(holds_run)
    for part in _parts(text_glob):
        if is_remote(part):
            remote.update(_find_remote(part, format, left_out))
            continue
        path = os.path.expanduser(part)
        allowed = _allowed(path, format)
        reasons = {match: _why_left_out(match, allowed) for match in _expand(path)}
        readable = [match for match, reason in reasons.items() if not reason]
        supported = [match for match in readable if not any(map(is_run, _folders_between(path, match)))]
        enters_folders = os.path.isdir(path) or "**" in path
        others = [why for why in reasons.values() if why and not (why == "folder(s)" and enters_folders)]
        if not supported:
            raise _nothing(part, format, sorted(set(others)), readable)
        files.update(map(os.path.abspath, supported))
        left_out.update(others)
        left_out["written by a run of jgpt"] += len(readable) - len(supported)
    if not files and not remote:
        raise UserError(
            "data.text_glob is empty. It must name files with text. Set it to a folder, or to a glob such as "
            "'folder/**/*.txt'."
        )
    once = _each_once(files)
    left_out["link(s) to another of these files"] = len(files) - len(once)
    _say_what_is_left_out([*once, *map(str, remote)], left_out, format)
    return [*sorted(map(Path, once)), *sorted(remote)]


def _find_remote(address: str, format: str, left_out: Counter[str]) -> list[RemoteFile]:
    """List the files of a supported kind that an address names; count the others."""
    found = find_remote(address)
    is_folder = not glob.has_magic(address) and [file.name for file in found] != [os.path.basename(address)]
    allowed = SUFFIXES[format] if is_folder else _allowed(address, format)
    readable = [file for file in found if file.name.lower().endswith(allowed)]
    others = [
        "".join(Path(file.name).suffixes[-2:]) or "without a suffix"
        for file in found
        if not file.name.lower().endswith(allowed)
    ]
    if not readable:
        raise _nothing(address, format, sorted(set(others)), [])
    left_out.update(others)
    return readable


def holds_run(folder: str | Path) -> bool:
    """Return whether a folder is a run directory, as its files show, even one that was moved or unpacked."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in RUN_FILES)


def is_packed(file: TextFile) -> bool:
    """Return whether a file is compressed, so that its size says little of the text's."""
    return file.name.lower().endswith((*PACKED, ".parquet"))


def _parts(text_glob: str) -> Iterator[str]:
    """Split a list at its commas, but not inside the name of a file or folder that exists, nor in a glob with matches.

    >>> list(_parts("no/such/*.txt, other"))
    ['no/such/*.txt', 'other']
    """
    names = text_glob.split(",")
    if len(names) > 1 and glob.has_magic(text_glob) and next(_expand(os.path.expanduser(text_glob.strip())), None):
        names = [text_glob]
    while names:
        together = range(len(names), 0, -1)
        exists = (n for n in together if os.path.exists(os.path.expanduser(",".join(names[:n]).strip())))
        n = next(exists, 1)
        part, names = ",".join(names[:n]), names[n:]
        if part.strip():
            yield part if os.path.exists(part) else part.strip()


def _expand(path: str) -> Iterator[str]:
    """Yield what a glob matches, files and folders; for a folder's name, all that is in it.

    "**" follows links to folders, and enters each folder once, by its real path, so loops of links end. Python's own
    `glob` follows such loops, in ways that double with each link.
    """
    if os.path.isfile(path):  # the name of an existing file is not a glob, even when it has a "[" in it
        yield path
        return
    root, parts = (path, ("**",)) if os.path.isdir(path) else (Path(path).anchor, Path(path).parts)
    parts = parts[1:] if root and parts[:1] == (root,) else parts
    parts = (*parts, "*") if parts[-1:] == ("**",) else parts
    real: list[tuple[str, tuple[str, ...]]] = [(root, parts)]
    linked, seen = real[:0], set()
    while real or linked:  # links come last, so that a file that is below the folder itself has that name
        folder, states = (real or linked).pop()
        first, rest = states[0], states[1:]
        if (key := (os.path.realpath(folder), len(rest))) in seen:
            continue
        seen.add(key)
        literal = os.path.join(folder, first)
        if not glob.has_magic(first) or os.path.lexists(literal):
            entries = [literal] if os.path.lexists(literal) else []
        elif first == "**":
            real.append((folder, rest))
            entries, rest = [entry for entry in _list(folder) if _visible(entry)], (first, *rest)
        else:
            shown = (entry for entry in _list(folder) if _visible(entry) or first.startswith("."))
            entries = [entry for entry in shown if fnmatch(os.path.basename(entry), first)]
        for entry in entries:
            if not rest:
                yield entry
            elif os.path.isdir(entry):
                (linked if os.path.islink(entry) else real).append((entry, rest))


def _list(folder: str) -> list[str]:
    if not os.path.isdir(folder or "."):
        return []
    try:
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder or "."))]
    except OSError as error:
        raise UserError(
            f"data.text_glob: the folder {folder} cannot be listed: {error.strerror}. All folders must be "
            "readable. Make it readable (chmod), or leave it out of data.text_glob."
        ) from error


def _visible(entry: str) -> bool:
    return not os.path.basename(entry).startswith(".")


def _why_left_out(match: str, allowed: tuple[str, ...]) -> str:
    """Say why a match is not read: mostly its suffix; "" where it is read."""
    if os.path.isdir(match):
        return "folder(s)"
    if not os.path.exists(match):
        return "broken link(s)"
    if not os.path.isfile(match):
        return "pipe(s) or device(s)"
    return "" if match.lower().endswith(allowed) else "".join(Path(match).suffixes[-2:]) or "without a suffix"


def _allowed(pattern: str, format: str) -> tuple[str, ...]:
    """Return how names that are read may end: as text also the suffix that a glob names, and a whole name."""
    name = os.path.basename(pattern)
    suffix = os.path.splitext(name)[1] if glob.has_magic(name) and not os.path.exists(pattern) else name
    is_named = (
        format == "text" and suffix and not os.path.isdir(pattern) and (suffix == name or not glob.has_magic(suffix))
    )
    return (*SUFFIXES[format], suffix.lower()) if is_named else SUFFIXES[format]


def _folders_between(pattern: str, match: str) -> list[str]:
    """List the folders of `match` that the user did not name: those below the part of `pattern` without a glob.

    >>> _folders_between("/input/**/*.txt", "/input/mine/texts/a.txt"), _folders_between("/a/b.txt", "/a/b.txt")
    (['/input/mine/texts', '/input/mine'], [])
    """
    named = pattern
    while glob.has_magic(named) and not os.path.exists(named):
        named = os.path.dirname(named)
    folders, folder, named = [], os.path.dirname(os.path.abspath(match)), os.path.abspath(named)
    while len(folder) > len(named):
        folders.append(folder)
        folder = os.path.dirname(folder)
    return folders


def _each_once(files: Iterable[str]) -> list[str]:
    """Keep one name of each real file: not a link where there is a choice.

    Size and time are compared as well, because some network file systems give the same inode to several files.
    """
    names: dict[tuple[object, ...], str] = {}
    for file in sorted(files, key=lambda file: (os.path.realpath(file) != file, file)):
        stat = os.stat(file)
        same = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat.st_ino else (os.path.realpath(file),)
        names.setdefault(same, file)
    return list(names.values())


def _nothing(part: str, format: str, others: list[str], of_runs: list[str]) -> UserError:
    kind = "text" if format == "text" else ".jsonl"
    what = f"only files that are not {kind} ({', '.join(others[:8])})" if others else "no file"
    what = f"only files that a run of jgpt wrote ({of_runs[0]})" if of_runs else what
    return UserError(
        f"data.text_glob: {part!r} matches {what} (current folder: {os.getcwd()}). Supported are {SUPPORTED[format]}. "
        "Set data.text_glob to a folder, or to a glob such as 'folder/**/*.txt'."
    )


def _say_what_is_left_out(files: list[str], left_out: Counter[str], format: str) -> None:
    odd = Counter(Path(file).suffix or "without a suffix" for file in files if not file.lower().endswith(KNOWN))
    if odd:
        log.info("text: read as plain text: %s", ", ".join(f"{n:,} {kind}" for kind, n in sorted(odd.items())))
    if counts := [f"{n:,} {kind}" for kind, n in sorted(left_out.items()) if n]:
        by_suffix = format == "text" and any(" ." in count for count in counts)
        hint = " (a glob that names a suffix reads it: 'folder/**/*.csv')" if by_suffix else ""
        log.warning("text: %s file(s); left out: %s%s", f"{len(files):,}", ", ".join(counts), hint)
