"""Choose the gather, micro-batch and remat that a config leaves to the device: search once, then remember the answer.

In the data path: before the parts of a run are built. A resumed run keeps what it started with, because sums of other
micro-batches are rounded differently.
"""

import hashlib
import json
import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jgpt.atomic_write import write_json
from jgpt.errors import UserError
from jgpt.hardware.process import user_cache
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.hosts import first_decides, gather_texts, is_first
from jgpt.planning.devices import Target, this_machine
from jgpt.planning.execution import Execution, execution_of
from jgpt.planning.gather import with_gather
from jgpt.planning.search import refusal, search
from jgpt.run_dir.identity import read_config, was_last_here
from jgpt.version import __version__
from jgpt.wording import GIB, format_duration

log = logging.getLogger("jgpt")


def is_auto(config: ConfigDict) -> bool:
    """Tell whether a config leaves its micro-batch or its remat to a search."""
    return not config.execution.micro_batch_size or config.execution.remat == "auto"


def with_execution_of_run(config: ConfigDict, run_dir: Path) -> ConfigDict:
    """Return a config with what was chosen when the run in `run_dir` started; unchanged if it ran on other devices."""
    is_open = is_auto(config) or config.execution.gather == "auto"
    if not is_open or not (run_dir / "config.json").is_file() or not was_last_here(run_dir):
        return config
    return _fill_in(config, execution_of(read_config(run_dir)))


def choose_execution(config: ConfigDict, shapes: ModelConfig, devices: list[jax.Device]) -> ConfigDict:
    """Return a config whose gather, micro-batch and remat are chosen for the devices that are here. Raises UserError.

    The choice of a search is kept in the user's cache directory. An unreadable cache is ignored.
    """
    target = _with_least_memory(this_machine(devices))
    config = with_gather(config, shapes, target)
    if not is_auto(config):
        return config
    cache, key = _read_cache(), _key(config, shapes, target)
    known = first_decides(lambda: cache.get(key))
    if known:
        chosen, how = Execution(*known), "as found before"
    else:
        log.info("searching for the fastest micro-batch and remat that fit: some compiles, once")
        chosen, how = _search(config, shapes, target)  # in all processes: XLA may let them share the work of a compile
        chosen = Execution(*first_decides(lambda: chosen))
        if is_first():
            _write_cache(cache | {key: chosen})
    config = _fill_in(config, chosen)
    log.info("chosen for %s: %s (%s)", target.kind, execution_of(config).flags(), how)
    return config


def _with_least_memory(target: Target) -> Target:
    """Return a target with what the smallest device of all processes has: each of them must choose the same."""
    known = [int(said) for said in gather_texts(str(target.memory_bytes or 0)) if said != "0"]
    return replace(target, memory_bytes=min(known, default=None))


def _search(config: ConfigDict, shapes: ModelConfig, target: Target) -> tuple[Execution, str]:
    start = time.monotonic()
    found = search(config, shapes, target, lambda tried: log.debug("tried %s", tried.execution.flags()))
    best = found.best()
    if best is None:
        raise UserError(refusal(found, config, target))
    speed = f", {best.tokens_per_second:,.0f} tokens/s predicted" if best.tokens_per_second else ""
    return best.execution, (
        f"{best.peak / GIB:.2f} of {found.limit / GIB:.2f} GiB{speed}; steps compiled: {len(found.tried)}, in"
        f" {format_duration(time.monotonic() - start)}"
    )


def _fill_in(config: ConfigDict, chosen: Execution) -> ConfigDict:
    """Return a config with what was chosen for the keys that it leaves open."""
    own = execution_of(config)
    return own._replace(
        micro_batch_size=own.micro_batch_size or chosen.micro_batch_size,
        remat=chosen.remat if own.remat == "auto" else own.remat,
        gather=chosen.gather if own.gather == "auto" else own.gather,
    ).put_into(config)


def _key(config: ConfigDict, shapes: ModelConfig, target: Target) -> str:
    """Digest all that the choice depends on."""
    groups = config.model, config.lora, config.precision, config.batch, config.execution
    settings = [*(group.to_dict() for group in groups), config.data.format, repr(shapes), config.optimizer.kind]
    kinds = [device.device_kind for device in target.devices]
    machine = [kinds, target.memory_bytes, repr(target.rates), jax.__version__, __version__]
    return hashlib.sha256(json.dumps([settings, machine], sort_keys=True).encode()).hexdigest()


def _cache_file() -> Path:
    return user_cache() / "chosen.json"


def _read_cache() -> dict[str, Execution]:
    try:
        return {
            key: Execution(int(micro), str(remat), int(chunk), str(attention), str(gather))
            for key, (micro, remat, chunk, attention, gather) in json.loads(
                _cache_file().read_text(encoding="utf-8")
            ).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(chosen: dict[str, Execution]) -> None:
    with suppress(OSError):
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_cache_file(), chosen)
