"""The configs that come with jgpt, by name, and a user's own by their path; and what any path of a user means.

Beside the data path: the command line asks here which file --config means.
"""

import os.path
from pathlib import Path

# An installed package has them inside; a checkout, also one installed with --editable, has them beside jgpt/.
FOLDERS = (Path(__file__).parents[1] / "_configs", Path(__file__).parents[2] / "configs")


def config_files() -> dict[str, Path]:
    """Return the configs that come with jgpt, by name."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def user_path(name: str) -> Path:
    """Return the path that a user wrote; ~ is their home, and ~NAME of nobody is a name like any other."""
    return Path(os.path.expanduser(name))


def find_config(name: str) -> Path | None:
    """Return the file that --config names, or None: a file of the user's own, or one of ours.

    One of ours is found in any folder: by its name, by its file's name, and as a checkout has it, configs/X.py.

    >>> find_config("base") == find_config("base.py"), find_config("nothing")
    (True, None)
    """
    if os.path.isfile(name):  # unlike Path.is_file, it takes a name of any length
        return Path(name)
    spellings = {spelling: path for stem, path in config_files().items() for spelling in _spellings(stem)}
    return spellings[name] if name in spellings else None


def _spellings(stem: str) -> tuple[str, ...]:
    return stem, f"{stem}.py", f"configs/{stem}.py"
