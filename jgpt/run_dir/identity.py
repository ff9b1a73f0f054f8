"""The run directory: who may write in it, which run it holds, and how that run stands.

Beside the data path: the loop opens it first and closes it last.
"""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.atomic_write import write_file
from jgpt.config.defaults import default_config, flatten
from jgpt.errors import UserError
from jgpt.hardware.devices import local_devices
from jgpt.redaction import redact
from jgpt.run_dir.manifest import whole_steps

log = logging.getLogger("jgpt")

# What a run cannot change and still be the same run; anything else may be changed when it goes on.
FIXED = ("model.", "tokenizer.", "lora.", "precision.params", "optimizer.kind")
FREE = ("model.dropout", "lora.dropout")


@contextmanager
def open_run_dir(out_dir: str) -> Iterator[Path]:
    """Make the run directory, and hold it against other processes while the block runs.

    Raises UserError when it cannot be written, or when another run is writing in it.
    """
    run_dir = Path(out_dir).expanduser().absolute()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"out_dir={out_dir!r} cannot be written: {error.strerror}. It must be a directory that you may write in (on"
            " Kaggle below /kaggle/working). Set --config.out_dir=DIR."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training in {run_dir}. One run writes in a directory at a time. Wait for it, stop"
                " it, or set another --config.out_dir."
            ) from None
        yield run_dir


def look_for_run(run_dir: Path, config: ConfigDict) -> bool:
    """Tell whether `run_dir` holds a run to go on with; raise UserError where checkpoint.resume or that run forbids."""
    resume, parts = config.checkpoint.resume, [run_dir / "config.json", run_dir / "tokenizer" / "tokenizer.json"]
    found = all(part.is_file() for part in parts)
    if not found and whole_steps(run_dir / "checkpoints"):
        missing = " and ".join(str(part) for part in parts if not part.is_file())
        raise UserError(
            f"{run_dir} holds checkpoints, but not {missing}: without it they cannot be read as they were meant. Put it"
            " back, or set another --config.out_dir; nothing was changed."
        )
    steps = whole_steps(run_dir / "checkpoints")
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
    if steps and not (run_dir / "checkpoints" / str(steps[-1]) / "training").is_dir():
        raise UserError(
            f"{run_dir} holds an imported model: its checkpoint has no optimizer state to go on with. A training run"
            f" has a directory of its own. Set --config.init_from={run_dir} and another --config.out_dir."
        )
    if found:
        for change in check_same_run(run_dir, config):
            log.info("changed since this run was last started: %s", change)
    return found


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
        config.update(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} is damaged, or of another version of jgpt: {reason}. Put back the file that the run wrote, or name"
            " another run; nothing was changed."
        ) from None
    return config


def write_identity(run_dir: Path, config: ConfigDict) -> None:
    """Write config.json and versions.json."""
    write_json(run_dir / "config.json", json.loads(config.to_json()))
    packages = ("jgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "transformers", "numpy")
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # a checkout on the path
    versions["devices"] = _devices_here()
    write_json(run_dir / "versions.json", versions)


def was_last_here(run_dir: Path) -> bool:
    """Tell whether the run in `run_dir` was last started on such devices as are here."""
    try:
        return json.loads((run_dir / "versions.json").read_text())["devices"] == _devices_here()
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _devices_here() -> str:
    devices = local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def write_status(run_dir: Path, state: str, step: int, total_steps: int, reason: str, command: str) -> None:
    """Write status.json; `state` is running, finished, stopped or failed, and `command` is what makes the run go on."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    status = {"state": state, "step": step, "total_steps": total_steps, "reason": reason, "resume_command": command}
    write_json(run_dir / "status.json", status | {"time": now, "pid": os.getpid()})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is there whole or not at all, and no secret in it: a command line may hold one."""
    write_file(path, redact(json.dumps(value, indent=2)) + "\n")
