"""Restore an earlier run on Kaggle: find where its output is mounted, and copy its newest whole checkpoint.

Beside the data path: `jgpt.train` calls it before the loop, which then finds the run in its own directory. A session
starts with an empty working folder, and the output of the last session is an input.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from jgpt.data.find_files import holds_run
from jgpt.errors import UserError
from jgpt.kaggle.session import pack
from jgpt.kaggle.session.paths import find_runs, input_dir, scratch_dir
from jgpt.kaggle.session.publish import fetch
from jgpt.run_dir.identity import check_same_run, check_tokenizer, open_run_dir, read_config
from jgpt.run_dir.manifest import is_imported, read_meta, verify, whole_steps
from jgpt.run_dir.metrics_file import best_validation, read_metrics
from jgpt.training.extend import decay_step

FILES = ("config.json", "metrics.jsonl", "samples.txt")  # the loop deletes the lines after the checkpoint's step

log = logging.getLogger("jgpt")


def restore_earlier_run(config: ConfigDict) -> None:
    """Copy the newest whole checkpoint of this run, and the files beside it, into the run directory.

    Nothing is copied where that directory has the newest already, or where there is no earlier run. A damaged
    checkpoint and the output of another run are skipped, and the log says so.
    """
    if config.checkpoint.resume == "never":
        return
    with open_run_dir(config.out_dir) as run_dir:
        pack.remove_leftovers(run_dir)
        if holds_run(run_dir):
            pack.unpack(run_dir, run_dir)  # an earlier script of this session may have packed it
        here = whole_steps(run_dir / "checkpoints")
        upload = "" if here else config.checkpoint.upload  # an upload is never newer than the checkpoints here
        folders = [folder for folder in earlier_runs(upload) if _is_same_run(folder, config)]
        elsewhere = [(step, folder) for folder in folders for step in pack.checkpoints_in(folder)]
        elsewhere.sort(key=lambda entry: -entry[0])
        while elsewhere:
            step, folder = elsewhere[0]
            if here and here[-1] >= step:
                if not verify(run_dir / "checkpoints", here.pop()):
                    return
            elif _restore(folder, step, run_dir, config.checkpoint.keep_best):
                return
            else:
                elsewhere.pop(0)


def unpack_model(init_from: str) -> str:
    """Return `init_from`; where it is a packed run, unpack it in scratch and return the path of that."""
    folder = Path(init_from)
    if not init_from or not holds_run(folder) or not pack.checkpoints_in(folder) or (folder / "checkpoints").is_dir():
        return init_from
    run_dir = scratch_dir() / "jgpt" / "init_from"
    pack.unpack(folder, run_dir)
    return str(run_dir)


def earlier_runs(upload: str) -> Iterator[Path]:
    """Yield the folders that may hold this run, packed or not; of equal checkpoints the first one counts.

    First what is mounted, then what the run itself has uploaded to `upload` (checkpoint.upload), where that is not "".
    """
    yield from find_runs(input_dir())
    if upload and (fetched := fetch(upload, scratch_dir() / "jgpt" / "fetched")):
        yield from find_runs(fetched)


def _is_same_run(folder: Path, config: ConfigDict) -> bool:
    """Tell whether a folder holds the run of `config`; log why it does not."""
    try:
        theirs = read_config(folder)
        if config.init_from and theirs.init_from:  # these come from the model that both started from
            config = config.copy_and_resolve_references()
            config.model.update({**theirs.model, "dropout": config.model.dropout})
            config.tokenizer.update(theirs.tokenizer)
        check_same_run(folder, config)
    except UserError as error:
        log.info("not resumed from: %s", str(error).splitlines()[0].rstrip(":"))
        for line in str(error).splitlines()[1:-1]:
            log.info("%s", line)
        return False
    return True


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
    log.info("continuing from checkpoint %d of %s", step, folder)
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
    there = pack.checkpoints_in(folder)
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
