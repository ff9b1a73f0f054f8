"""Download the output of a run on Kaggle as a run directory on this machine.

Beside the data path: the verb `pull` of `python -m jgpt.kaggle`; the result opens like any run directory.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt.cli.terminal import write
from jgpt.errors import UserError
from jgpt.file_lock import hold
from jgpt.kaggle.session.pack import unpack
from jgpt.wording import json_text

if TYPE_CHECKING:
    from jgpt.kaggle.laptop.client import Kaggle

OUTPUTS = "outputs/"  # the run directory in Kaggle's working folder
ORIGIN = "pulled.json"  # in the run directory: which version it was pulled from


def check_replaceable(target: Path) -> None:
    """Raise UserError when `target` holds something that was not pulled, or was trained on since."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    origin, status = target / ORIGIN, target / "status.json"
    if not origin.is_file():
        raise UserError(f"{target} exists and was not pulled from Kaggle. Name another place: --to=DIR.")
    if status.is_file() and status.stat().st_mtime_ns > origin.stat().st_mtime_ns:
        raise UserError(f"the run in {target} was trained on since it was pulled. Name another place: --to=DIR.")


def download_run(kaggle: "Kaggle", slug: str, version: int, target: Path) -> None:
    """Make the run directory `target` from a version's output. Nothing in it changes before all files are here.

    Downloaded files are kept in a folder beside it: after an interruption the next call continues there.
    """
    files = {n: url for n, url in kaggle.output_files(slug, version).items() if n.startswith(OUTPUTS)}
    parts = target.with_name(f".{target.name}-{slug.replace('/', '-')}-{version}")
    with hold(parts, wait_for="downloading the same version"):
        for i, (name, url) in enumerate(files.items(), 1):
            path = parts / name
            if not path.resolve().is_relative_to((parts / OUTPUTS).resolve()):
                raise UserError(
                    f"an output of {slug} is called {name!r} and would land outside of {target}. A run writes below"
                    " outputs/. Nothing was taken from it; look at it on kaggle.com."
                )
            write(f"{i} of {len(files)}: {name}\n")
            kaggle.download(url, path)
        unpacked = parts / "run"
        shutil.rmtree(unpacked, ignore_errors=True)  # of an interrupted call
        unpack(parts / OUTPUTS, unpacked)
        origin = json_text({"slug": slug, "version": version}, indent=None)
        (unpacked / ORIGIN).write_text(f"{origin}\n", encoding="utf-8")
        if target.exists():
            target.replace(parts / "before")
        unpacked.replace(target)
        shutil.rmtree(parts)
