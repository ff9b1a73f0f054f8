"""Restore an earlier run: find where its output is mounted or was uploaded, and copy its newest whole checkpoint.

Beside the data path: `jgpt.train` calls it before the loop, which then finds the run in its own directory. A session
starts with an empty working folder, and the output of the last session is an input.
"""

import logging
import shutil
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from jgpt.data.find_files import RUN_FILES, holds_run
from jgpt.errors import UserError
from jgpt.kaggle.session import pack
from jgpt.kaggle.session.bucket import fetch as fetch_from_bucket
from jgpt.kaggle.session.bucket import newest_step
from jgpt.kaggle.session.pack import checkpoints_in
from jgpt.kaggle.session.paths import find_runs, input_dir, scratch_dir
from jgpt.kaggle.session.publish import fetch, parse_target
from jgpt.parallel.hosts import first_decides
from jgpt.run_dir.identity import check_same_run, check_tokenizer, open_run_dir, read_config
from jgpt.run_dir.manifest import is_imported, read_meta, verify, whole_steps
from jgpt.run_dir.metrics_file import best_validation, read_metrics
from jgpt.training.extend import decay_step

FILES = ("config.json", "metrics.jsonl", "samples.txt")  # the loop deletes the lines after the checkpoint's step

log = logging.getLogger("jgpt")


def restore_earlier_run(config: ConfigDict) -> None:
    """Copy the newest whole checkpoint of this run, and the files beside it, into the run directory.

    Nothing is copied where that directory has the newest already, or where there is no earlier run. A damaged
    checkpoint and the output of another run are skipped, and the log says so. Of several processes the first one
    copies, and the others wait.
    """
    target = parse_target(config.checkpoint.upload) if config.checkpoint.upload else None
    address = target.handle if target and target.kind == "bucket" else ""
    if address:
        first_decides(lambda: _check_is_free(address, config))
    if config.checkpoint.resume == "never":
        return
    with open_run_dir(config.out_dir) as run_dir:
        first_decides(lambda: _restore_newest(config, run_dir, address))


def _check_is_free(address: str, config: ConfigDict) -> None:
    """Raise UserError where a bucket holds another run: uploads would replace it, and no earlier version is kept."""
    with tempfile.TemporaryDirectory(dir=scratch_dir(), prefix="found-") as folder:
        found = fetch_from_bucket(address, Path(folder), *RUN_FILES)
        if found is None or not holds_run(found):
            return
        differs = ["checkpoint.resume='never'"] if config.checkpoint.resume == "never" else _differs(found, config)
        differs = [line.strip().replace(folder, address) for line in differs]
    if differs:
        raise UserError(
            f"checkpoint.upload={address!r} holds another run, which uploads of this one would replace:\n  "
            + "\n  ".join(differs)
            + f"\nSet another folder, such as --config.checkpoint.upload={address}-2, or the settings of that run."
        )


def _restore_newest(config: ConfigDict, run_dir: Path, address: str) -> None:
    pack.remove_leftovers(run_dir)
    if holds_run(run_dir):
        pack.unpack(run_dir, run_dir)  # an earlier script of this session may have packed it
    here = whole_steps(run_dir / "checkpoints")
    # A bucket says quickly which step it has: another machine may have gone on. Kaggle and the Hub count as older.
    upload = config.checkpoint.upload if not here or (address and newest_step(address) > here[-1]) else ""
    with tempfile.TemporaryDirectory(dir=scratch_dir(), prefix="fetched-") as fetched:
        folders = find_runs(input_dir())  # of equal checkpoints the first one counts
        if upload and (found := fetch(upload, Path(fetched))):
            folders += find_runs(found)
        elsewhere = [
            (step, folder) for folder in folders if _is_same_run(folder, config) for step in checkpoints_in(folder)
        ]
        elsewhere.sort(key=lambda entry: -entry[0])
        while elsewhere:
            step, folder = elsewhere[0]
            if here and here[-1] >= step:
                if not verify(run_dir / "checkpoints", here.pop()):
                    return
            elif _restore(folder, step, run_dir, config.checkpoint.keep_best):
                where = upload if folder.is_relative_to(fetched) else folder
                log.info("continuing from checkpoint %d of %s", step, where)
                return
            else:
                elsewhere.pop(0)


def unpack_model(init_from: str) -> str:
    """Return `init_from`; where it is a packed run, unpack it in scratch and return the path of that."""
    folder = Path(init_from)
    if not init_from or not holds_run(folder) or not checkpoints_in(folder) or (folder / "checkpoints").is_dir():
        return init_from
    run_dir = scratch_dir() / "jgpt" / "init_from"
    shutil.rmtree(run_dir, ignore_errors=True)  # it may hold another model, of an earlier cell of a notebook
    pack.unpack(folder, run_dir)
    return str(run_dir)


def _is_same_run(folder: Path, config: ConfigDict) -> bool:
    """Tell whether a folder holds the run of `config`; log why it does not."""
    differs = _differs(folder, config)
    for line in ("not resumed from: " + differs[0].rstrip(":"), *differs[1:]) if differs else ():
        log.info("%s", line)
    return not differs


def _differs(folder: Path, config: ConfigDict) -> list[str]:
    """Return what says that a folder does not hold the run of `config`, line by line; [] where it does."""
    try:
        theirs = read_config(folder)
        if config.init_from and theirs.init_from:  # these come from the model that both started from
            config = config.copy_and_resolve_references()
            config.model.update({**theirs.model, "dropout": config.model.dropout})
            config.tokenizer.update(theirs.tokenizer)
        check_same_run(folder, config)
    except UserError as error:
        first, *more = str(error).splitlines()
        return [first, *more[:-1]]
    return []


def _restore(folder: Path, step: int, run_dir: Path, keep_best: bool) -> bool:
    """Copy a checkpoint and the files beside it into the run directory; return whether it was whole.

    Its manifest is copied last: if the process is killed before that, there is no checkpoint yet, and the next call
    starts again.
    """
    staging = _fetch_whole(folder, step, run_dir)
    tokenizer = pack.fetch_folder(folder, "tokenizer", run_dir) if staging else None
    if staging is None or tokenizer is None or not _is_its_tokenizer(tokenizer / "tokenizer", staging, step):
        pack.remove_leftovers(run_dir)
        return False
    for name in FILES:
        if (folder / name).is_file():
            pack.copy_file(folder / name, run_dir / name)
    pack.install(tokenizer)
    for other in _kept_beside(folder, step, keep_best):
        if other_staging := _fetch_whole(folder, other, run_dir):
            pack.install(other_staging)
    pack.install(staging)
    return True


def _is_its_tokenizer(tokenizer: Path, staging: Path, step: int) -> bool:
    """Tell whether a checkpoint was trained with this tokenizer; log a warning where it was not."""
    try:
        check_tokenizer(tokenizer, step, read_meta(staging, step))
    except UserError as error:
        log.warning("checkpoint %d is skipped: %s", step, error)
        return False
    return True


def _kept_beside(folder: Path, step: int, keep_best: bool) -> set[int]:
    """Return the steps before `step` that a run keeps beside its newest ones: the best, that before a wsd decay."""
    there = checkpoints_in(folder)
    best = best_validation([r for r in read_metrics(folder / "metrics.jsonl") if r["step"] in there])
    kept = {best["step"]} if keep_best and best else set()
    kept.add(decay_step(read_config(folder).optimizer))
    return {earlier for earlier in kept.intersection(there) if earlier < step}


def _fetch_whole(folder: Path, step: int, run_dir: Path) -> Path | None:
    """Fetch a checkpoint if it matches its manifest and can be resumed; else log what is wrong, and return None."""
    staging = pack.fetch_checkpoint(folder, step, run_dir)
    if staging is None:
        return None
    damage = verify(staging, step)
    if not damage and is_imported(staging, step):
        damage = "it is an imported model, without the optimizer's state"
    if damage:
        log.warning("checkpoint %d of %s is skipped: %s", step, folder, damage)
        shutil.rmtree(staging)
        return None
    return staging
