"""Micro-batch and remat where a config leaves them to the device: searched for once, then remembered.

In the data path: before `setup.py` builds the parts of a run. A run that goes on keeps what it began with, because
sums of other micro-batches are rounded differently.
"""

import hashlib
import json
import logging
import time
from contextlib import suppress
from pathlib import Path

import jax
from ml_collections import ConfigDict

import jgpt
from jgpt.atomic_write import write_file
from jgpt.config.defaults import flatten
from jgpt.errors import UserError
from jgpt.hardware.process import user_cache
from jgpt.model.shapes import ModelConfig
from jgpt.planning.devices import Target, this_machine
from jgpt.planning.estimate import Choice, choice_of, with_choice
from jgpt.planning.search import refusal, search
from jgpt.run_dir.identity import read_config, was_last_here
from jgpt.wording import GIB, format_duration

ASKED = (
    "model.",
    "lora.",
    "precision.",
    "batch.",
    "execution.",
    "data.format",
)

log = logging.getLogger("jgpt")


def is_auto(config: ConfigDict) -> bool:
    """Tell whether a config leaves its micro-batch or its remat to the device."""
    return not config.execution.micro_batch_size or config.execution.remat == "auto"


def as_begun(config: ConfigDict, run_dir: Path) -> ConfigDict:
    """Take what was chosen when the run in `run_dir` began, unless it goes on on other devices."""
    if not is_auto(config) or not (run_dir / "config.json").is_file() or not was_last_here(run_dir):
        return config
    return with_choice(config, _only_where_asked(config, choice_of(read_config(run_dir))))


def settle(config: ConfigDict, shapes: ModelConfig, devices: list[jax.Device]) -> ConfigDict:
    """Return a config whose micro-batch and remat are chosen for the devices that are here. Raises UserError.

    The choice is remembered in the user's cache directory; a memory that cannot be read or written is none.
    """
    if not is_auto(config):
        return config
    target = this_machine(devices)
    memory, key = _remembered(), _key(config, shapes, target)
    if key in memory:
        chosen, how = _only_where_asked(config, memory[key]), "as found before"
    else:
        log.info("searching for the fastest micro-batch and remat that fit: some compiles, once")
        chosen, how = _searched(config, shapes, target)
        _remember(memory | {key: chosen})
    log.info("chosen for %s: %s (%s)", target.kind, chosen.flags(), how)
    return with_choice(config, chosen)


def _searched(config: ConfigDict, shapes: ModelConfig, target: Target) -> tuple[Choice, str]:
    began = time.monotonic()
    found = search(config, shapes, target, lambda tried: log.debug("tried %s", tried.choice.flags()))
    best = found.best()
    if best is None:
        raise UserError(refusal(found, target))
    speed = f", {best.tokens_per_second:,.0f} tokens/s predicted" if best.tokens_per_second else ""
    return best.choice, (
        f"{best.peak / GIB:.2f} of {found.limit / GIB:.2f} GiB{speed}; {len(found.tried)} compiles in"
        f" {format_duration(time.monotonic() - began)}"
    )


def _only_where_asked(config: ConfigDict, chosen: Choice) -> Choice:
    """Return what was chosen where the config leaves it open, else what the config says."""
    own = choice_of(config)
    return own._replace(
        micro_batch_size=own.micro_batch_size or chosen.micro_batch_size,
        remat=chosen.remat if own.remat == "auto" else own.remat,
    )


def _key(config: ConfigDict, shapes: ModelConfig, target: Target) -> str:
    """Digest all that the choice depends on."""
    asked = {key: value for key, value in flatten(config).items() if key.startswith(ASKED)}
    kinds = [device.device_kind for device in target.devices]
    of = [asked, repr(shapes), kinds, target.memory_bytes, repr(target.rates), jax.__version__, jgpt.__version__]
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def _file() -> Path:
    return user_cache() / "chosen.json"


def _remembered() -> dict[str, Choice]:
    try:
        return {
            key: Choice(int(micro), str(remat), int(chunk), str(attention))
            for key, (micro, remat, chunk, attention) in json.loads(_file().read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(choices: dict[str, Choice]) -> None:
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_file(_file(), json.dumps(choices, indent=2) + "\n")
