"""The Python API: load a model and use it, train one. For notebooks and scripts.

    model = jgpt.load("runs/mine")
    model.generate("Once", max_new_tokens=50)
    result = jgpt.train("quickstart", {"optimizer.total_steps": 100})

`docs/api.md` describes it; names that are not there may change. A mistake is a `jgpt.UserError`: its message says what
was given, what is allowed, and what to do.

Beside the data path: above all rooms; the commands call it.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.cli.run import set_up_logging
from jgpt.config.named import changed, check_arguments, config_named, plain
from jgpt.data.chat_template import read_template
from jgpt.errors import UserError
from jgpt.hardware.process import set_up_process
from jgpt.inference.arguments import whole
from jgpt.kaggle.session.open import open_session
from jgpt.kaggle.session.secrets import provide_hub_token
from jgpt.loading.load import load_model
from jgpt.loading.model import Model
from jgpt.model.precision import DTYPES
from jgpt.run_dir.metrics_file import MOST_STEPS
from jgpt.training.result import TrainResult, train_result
from jgpt.training.start import train as start_training


def load(
    name: str | Path,
    *,
    step: int | None = None,
    base: str | Path = "",
    compute: str = "auto",
    devices: str | int = "auto",
    context_length: int = 0,
    rows: int = 1,
    chat_template: str | Path = "",
) -> Model:
    """Load a model: `name` is a run directory, a Hugging Face or PEFT directory, or a name on the Hub.

    Args:
        step: the checkpoint of a run to take; without it the newest whole one.
        base: where the base model of LoRA adapters is now, if it has moved.
        compute: the dtype of matrix products: "fp32", "fp16", "bf16", or "auto", which is what suits the device.
        devices: how many devices share the model: 1, 2, "all", or "auto", which is one if the model fits there.
        context_length: the most tokens in view for which there must be memory; 0: the model's own.
        rows: the most texts at a time for which there must be memory.
        chat_template: a file with a Jinja template, instead of the model's own.

    Raises:
        UserError: there is no such model, it is damaged, or it does not fit.
    """
    if not isinstance(name, str | PathLike) or not str(name):
        raise UserError(f"the model is {name!r}. Allowed: a run directory, a model directory, or a name on the Hub.")
    if not isinstance(compute, str) or compute not in ("auto", *DTYPES):
        raise UserError(f"compute={compute!r}. Allowed: auto, {', '.join(DTYPES)}. Take auto.")
    step = None if step is None else whole("step", step, 0, MOST_STEPS)
    context_length, rows = whole("context_length", context_length, 0), whole("rows", rows, 1)
    template = read_template(str(chat_template)) if chat_template else ""
    provide_hub_token(str(name))
    set_up_process()
    loaded = load_model(
        str(name),
        step=step,
        base=str(base or ""),
        compute=compute,
        devices=str(devices),
        context_length=context_length,
        rows=rows,
    )
    return Model(str(name), loaded, template or loaded.tokenizer.settings.get("chat_template") or "")


def train(
    config: ConfigDict | str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    on_record: Callable[[dict[str, Any]], None] | None = None,
    command: str = "",
) -> TrainResult:
    """Train a model, or go on with a run that was stopped; return how it ended.

    Args:
        config: the name of a config of ours, the path of a config file, or what its get_config() returns.
        changes: other values for its keys, such as {"optimizer.total_steps": 100}.
        on_record: called in this thread with each record of metrics.jsonl (step, loss, ...); its errors end the run.
        command: what a user would type to go on, for status.json.

    Raises:
        UserError: what the user can fix, before the first step wherever it can be known.
        OutOfMemory, TrainingDiverged: see jgpt.errors.
    """
    check_arguments(config, changes, on_record)
    given = "config" if isinstance(config, ConfigDict) else repr(str(config))
    again = f"jgpt.train({given}, {plain(changes)!r})" if changes else f"jgpt.train({given})"
    config = config if isinstance(config, ConfigDict) else config_named(str(config))
    config = changed(config, changes or {})
    set_up_logging()
    with open_session(config) as (config, on_saved):
        status = start_training(config, command or again, on_saved, on_record)
    return train_result(status)
