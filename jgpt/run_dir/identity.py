"""The run directory: who may write in it, and which run it holds.

Beside the data path: the loop opens it first and closes it last.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.atomic_write import write_file, write_json
from jgpt.config.check import problems
from jgpt.config.defaults import default_config, flatten
from jgpt.config.files import user_path
from jgpt.errors import UserError
from jgpt.file_lock import HeldElsewhere, hold, other_holder
from jgpt.hardware.devices import all_devices
from jgpt.parallel.hosts import barrier, first_decides, gather_texts, is_first
from jgpt.run_dir.manifest import is_imported, newest_meta, steps_without_manifest, whole_steps
from jgpt.run_dir.metrics_file import read_metrics

log = logging.getLogger("jgpt")

# What a run cannot change and still be the same run; anything else may be changed when it goes on.
FIXED = ("model.", "tokenizer.", "lora.", "precision.params", "optimizer.kind")
FREE = ("model.dropout", "lora.dropout")
PATHS = ("out_dir", "data.cache_dir", "data.text_glob")  # of a process's own machine
SHARED_SECONDS = 30  # until a file that another machine has written is seen on a disk that both share


@contextmanager
def open_run_dir(out_dir: str) -> Iterator[Path]:
    """Make the run directory, and hold it against other processes while the block runs.

    Of several processes of one run the first holds it; the others must find it on a disk that they share. Raises
    UserError when it cannot be written, when another run is writing in it, or when it is not shared.
    """
    run_dir = user_path(out_dir).absolute()
    with ExitStack() as lock:
        try:
            if is_first():
                lock.enter_context(hold(run_dir))
        except OSError as error:
            raise UserError(
                f"out_dir={out_dir!r} cannot be written: {error.strerror}. It must be a directory that you may write in"
                " (on Kaggle below /kaggle/working). Set --config.out_dir=DIR."
            ) from None
        except HeldElsewhere as holder:
            raise UserError(
                f"{holder} is training in {run_dir}. One run writes in a directory at a time. Wait for it, stop it, or"
                " set another --config.out_dir."
            ) from None
        _check_shared(run_dir)
        yield run_dir


def why_lost(run_dir: Path) -> str:
    """Say why this process, which trains in a run directory, must not write there any more; "" where it may.

    Orbax makes directories that are missing: without this, checkpoints would land in a directory without the config
    and the tokenizer, or in that of another run.
    """
    if not (run_dir / "config.json").is_file():
        return (
            f"{run_dir / 'config.json'} is gone: {run_dir} was removed or renamed while this run wrote to it. Put it"
            " back, then run the same command again: it continues from the last checkpoint there."
        )
    if other := other_holder(run_dir):
        return (
            f"{run_dir} was removed while this run wrote to it, and {other} has made it again. This run ends, and"
            " leaves it alone. Take another --config.out_dir for one of them."
        )
    return ""


def _check_shared(run_dir: Path) -> None:
    """Raise UserError, in all processes of a run, where one of them does not see what the first one writes here."""
    name, where = first_decides(lambda: [f".seen-{os.getpid()}-{time.time_ns()}", str(run_dir)])
    mark = run_dir / name
    if is_first():
        write_file(mark, "")
    barrier()
    for _ in range(SHARED_SECONDS):
        if mark.exists():
            break
        time.sleep(1)
    seen = gather_texts("yes" if mark.exists() else str(run_dir))
    if is_first():
        mark.unlink(missing_ok=True)
    for i, answer in enumerate(seen):
        if answer != "yes":
            raise UserError(
                f"out_dir is {answer} in process {i}, and is not the directory where process 0 writes, {where}. Each"
                " process writes its part of a checkpoint there, so it must be on a disk that all share (NFS, Lustre, a"
                " mounted volume). Set --config.out_dir=DIR to such a directory."
            )


def look_for_run(run_dir: Path, config: ConfigDict) -> bool:
    """Tell whether `run_dir` holds a run to go on with; raise UserError where checkpoint.resume or that run forbids.

    Also where the checkpoints that it had are gone, and where its tokenizer is another one: going on, or beginning
    again, would overwrite what is left of it.
    """
    resume, parts = config.checkpoint.resume, [run_dir / "config.json", run_dir / "tokenizer" / "tokenizer.json"]
    found = all(part.is_file() for part in parts)
    if not found and whole_steps(run_dir / "checkpoints"):
        missing = " and ".join(str(part) for part in parts if not part.is_file())
        raise UserError(
            f"{run_dir} holds checkpoints, but not {missing}: without it they cannot be read as they were meant. Put it"
            " back, or set another --config.out_dir; nothing was changed."
        )
    checkpoints = run_dir / "checkpoints"
    steps = whole_steps(checkpoints)
    _check_manifests(checkpoints)
    if resume == "must" and not (found and steps):
        raise UserError(
            f"checkpoint.resume='must', and {run_dir} holds no run that has saved a checkpoint. Name the out_dir of"
            " one, or set --config.checkpoint.resume=auto."
        )
    if resume == "never" and found:
        raise UserError(
            f"checkpoint.resume='never', and {run_dir} holds a run, which a start from step 0 would overwrite. Set"
            " another --config.out_dir, or remove that directory yourself."
        )
    if found and not steps:
        _check_never_saved(run_dir)
    if steps and is_imported(checkpoints, steps[-1]):
        raise UserError(
            f"{run_dir} holds an imported model: its checkpoint has no optimizer state to go on with. A training run"
            f" has a directory of its own. Set --config.init_from={run_dir} and another --config.out_dir."
        )
    if found:
        check_tokenizer(run_dir / "tokenizer", steps[-1] if steps else 0, newest_meta(checkpoints, steps))
        for change in check_same_run(run_dir, config):
            log.info("changed since this run was last started: %s", change)
    return found


def _check_manifests(checkpoints: Path) -> None:
    """Refuse steps whose manifests somebody removed: a run that was killed while it saved leaves one at most."""
    without = steps_without_manifest(checkpoints)
    if len(without) > 1:
        raise UserError(
            f"{checkpoints} holds steps {', '.join(map(str, without))} without their manifests (STEP.sha256), so that"
            " nothing tells whether they are whole, and going on would delete them. A run that is killed while it saves"
            " leaves one such step at most. Put the manifests back. Where you are sure of a step, make its manifest: cd"
            f" {shlex.quote(str(checkpoints))} && find {without[-1]} -type f -exec sha256sum {{}} + >"
            f" {without[-1]}.sha256. Or remove the"
            " folders of these steps, or set another --config.out_dir. Nothing was changed."
        )


def _check_never_saved(run_dir: Path) -> None:
    """Refuse to begin a run again that has no checkpoint left, though its metrics reach beyond its second save.

    A save waits until the one before it is whole: such a run had one, unless it diverged before.
    """
    last = max((record["step"] for record in read_metrics(run_dir / "metrics.jsonl")), default=0)
    every = read_config(run_dir).checkpoint.every_steps
    if last > 2 * every:
        raise UserError(
            f"{run_dir} holds a run that reached step {last} (metrics.jsonl) with checkpoint.every_steps={every}, and"
            " no checkpoint with a manifest (STEP.sha256). A start from step 0 would overwrite what is left of it. Put"
            " the checkpoints and their manifests back. To begin again from step 0 (a run that diverged early has no"
            f" checkpoint), remove {run_dir / 'metrics.jsonl'}, or set another --config.out_dir. Nothing was changed."
        )


def check_tokenizer(directory: Path, step: int, meta: dict[str, Any]) -> None:
    """Raise UserError where a run's tokenizer is not the one that the checkpoint at `step` was trained with."""
    expected, path = meta.get("tokenizer_sha256"), directory / "tokenizer.json"
    if expected and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise UserError(
            f"{path} is not the tokenizer that checkpoint {step} of this run was trained with: its sha256 is not"
            f" {expected}. With another one the model reads and writes other text. Put back the file that the run"
            " wrote, or name another run; nothing was changed."
        )


def check_same_run(run_dir: Path, config: ConfigDict) -> list[str]:
    """Compare `config` with that of the run in `run_dir`; return what may change and did, as "key: old -> new".

    Raises UserError with the list of those that may not: another model, tokenizer or kind of optimizer.
    """
    old, new = flatten(json.loads(read_config(run_dir).to_json())), flatten(json.loads(config.to_json()))
    changed = {
        key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
    }
    fixed = [text for key, text in changed.items() if key.startswith(FIXED) and key not in FREE]
    if bool(old["init_from"]) != bool(new["init_from"]):  # two names may be one model: the files' fingerprint tells
        fixed.append(changed["init_from"])
    if fixed:
        raise UserError(
            f"{run_dir} holds a run with another model, tokenizer or optimizer:\n  "
            + "\n  ".join(fixed)
            + "\nIt can go on only with its own. "
            "Take those settings back, or set another --config.out_dir; nothing there was changed."
        )
    return [text for key, text in changed.items() if key != "out_dir"]


def read_config(run_dir: Path) -> ConfigDict:
    """Read the config of the run in `run_dir`; keys that are newer than the run have their defaults."""
    config, path = default_config(), run_dir / "config.json"
    try:
        config.update(json.loads(path.read_text(encoding="utf-8")))
        given = config.copy_and_resolve_references()
        if given.optimizer.total_steps:
            given.optimizer.update(budget_hours=0.0, budget_epochs=0.0)  # the steps that they became stand beside them
        reason = "; ".join(problems(given))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    if reason:
        raise UserError(
            f"{path} is damaged, or of another version of jgpt: {reason}. Put back the file that the run wrote, or name"
            " another run; nothing was changed."
        )
    return config


def comparable(config: ConfigDict) -> tuple[dict[str, str], str, str]:
    """Return what must be the same in all processes of a run, as `check_same` takes it: the config and the packages.

    Paths may differ: the machines may have disks of their own.
    """
    facts = {key: repr(value) for key, value in flatten(json.loads(config.to_json())).items() if key not in PATHS}
    advice = "Start all of them with the same command, in the same environment, with packages of the same versions."
    packages = {name: version for name, version in _versions().items() if name not in ("python", "machine")}
    return facts | packages, "their config or their packages", advice


def write_identity(run_dir: Path, config: ConfigDict) -> None:
    """Write config.json and versions.json."""
    write_json(run_dir / "config.json", json.loads(config.to_json()))
    write_json(run_dir / "versions.json", _versions() | {"devices": _devices_here()})


def _versions() -> dict[str, str]:
    packages = ("jgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "transformers", "numpy")
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # a checkout on the path
    return versions


def was_last_here(run_dir: Path) -> bool:
    """Tell whether the run in `run_dir` was last started on such devices as are here."""
    try:
        return json.loads((run_dir / "versions.json").read_text(encoding="utf-8"))["devices"] == _devices_here()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def _devices_here() -> str:
    devices = all_devices()
    return f"{len(devices)} x {devices[0].device_kind}"
