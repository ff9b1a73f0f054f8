"""The folders of Kaggle's machine: inputs in the old and the new mount layout, the folder that is kept, and scratch.

Beside the data path: configs/kaggle_t4.py and `resume.py` use them.
"""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from jgpt.data.find_files import holds_run
from jgpt.errors import UserError
from jgpt.kaggle.session.bootstrap import kaggle_root, scratch_dir

__all__ = ["check_inputs", "find_input", "find_runs", "input_dir", "on_kaggle", "outputs_dir", "scratch_dir"]
__all__ += ["working_dir"]

# The folders of the new layout, and the number of names from each to a mount.
LEVELS = {"datasets": 2, "notebooks": 2, "models": 5, "competitions": 1}
MOST_LEVELS = 7  # input/models/OWNER/MODEL/FRAMEWORK/VARIATION/VERSION, the deepest mount there is
MOST_FOLDERS = 10_000  # a dataset of images may have more; a run or a model lies near the top


def on_kaggle() -> bool:
    """Tell whether this process runs on Kaggle's machine, or in an imitation of it."""
    return bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE"))


def input_dir() -> Path:
    """Return the folder where all inputs are mounted, read-only."""
    return kaggle_root() / "input"


def working_dir() -> Path:
    """Return the folder that Kaggle keeps when a run ends, up to 20 GB."""
    return kaggle_root() / "working"


def outputs_dir() -> Path:
    """Return the run directory of a run on Kaggle."""
    return working_dir() / "outputs"


def find_input(kind: str, name: str) -> Path:
    """Return where an input is mounted.

    `kind` is a key of LEVELS, `name` is from the address of its page: "owner/slug" of a dataset or of a notebook's
    output, "owner/model/framework/variation/version" of a model. Raises UserError, which lists what is mounted, where
    the input is not.
    """
    parts = name.strip("/").split("/")
    if kind in ("datasets", "notebooks"):
        parts = parts[:2] + [part for part in parts[2:] if not part.isdigit()]  # mounted without a version number
    if len(parts) != LEVELS.get(kind):
        raise UserError(
            f"{kind} {name!r} is not the name of an input. Allowed: datasets or notebooks 'owner/slug', models "
            "'owner/model/framework/variation/version', competitions 'slug'. Copy it from the address of its page."
        )
    if kind == "models":
        parts[2] = parts[2].lower()
    below = Path(*parts[1:] or parts)  # the old layout leaves the owner out
    for place in (input_dir() / kind / Path(*parts), input_dir() / below):
        if place.is_dir():
            return place
    tail = below.parts[-2:]  # a model's version alone is a number
    candidates = [folder for folder in folders_below(input_dir()) if folder.parts[-len(tail) :] == tail]
    if len(candidates) == 1:
        return candidates[0]
    mounted = ", ".join(str(folder) for folder in mounts()) or "nothing"
    several = f"{len(candidates)} folders fit: {', '.join(map(str, candidates[:3]))}. " if candidates else ""
    raise UserError(
        f"{kind} {name!r} is not mounted below {input_dir()}. {several}Mounted: {mounted}. Add it to the notebook (Add "
        "Input, or push's --dataset and --model); a new dataset cannot be mounted until Kaggle has processed it."
    )


def check_inputs() -> None:
    """Raise UserError when an input that the kernel was pushed with is not mounted.

    Without it a run would start from scratch, or train on half of its text, for a whole session.
    """
    for entry in filter(None, os.environ.get("JGPT_KAGGLE_INPUTS", "").split(",")):
        kind, name = entry.split(" ")
        find_input(kind, name)


def find_runs(folder: Path) -> list[Path]:
    """List the run directories in `folder` and below, packed or not, those nearest to the top first."""
    return [path for path in (folder, *folders_below(folder)) if holds_run(path)]


def mounts() -> list[Path]:
    """List the folders where inputs are mounted: input/NAME, or input/datasets/OWNER/NAME and so on."""
    folders = []
    for top in sorted(input_dir().glob("*")):
        folders += sorted(top.glob("/".join("*" * LEVELS[top.name]))) if top.name in LEVELS else [top]
    return folders


def folders_below(folder: Path) -> Iterator[Path]:
    """Yield the folders below one, level by level, down to the level of the deepest mount; each one only once."""
    waiting, seen = deque([(folder, 0)]), set[Path]()
    while waiting and len(seen) < MOST_FOLDERS:
        parent, level = waiting.popleft()
        try:
            children = [parent / entry.name for entry in os.scandir(parent) if entry.is_dir()]
        except OSError:  # it does not exist, or is not readable
            continue
        for child in sorted(children):
            if (real := child.resolve()) in seen:
                continue
            seen.add(real)
            yield child
            if level + 1 < MOST_LEVELS:
                waiting.append((child, level + 1))
