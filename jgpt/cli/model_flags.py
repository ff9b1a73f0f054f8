"""The flags that the commands share which load a model by its name: generate, chat, evaluate.

Beside the data path. A flag is defined when its command runs, not at import: absl takes a name once a process.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from jgpt.errors import UserError

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def define_model() -> None:
    """Define --model, and which state of it."""
    flags.DEFINE_string("model", None, "a run directory, a Hugging Face model directory, or a name on its Hub")
    flags.DEFINE_alias("run_dir", "model")
    flags.DEFINE_integer("step", None, "the checkpoint of a run to take; without it the newest", lower_bound=0)
    flags.DEFINE_string("base", "", "where the base model of LoRA adapters is now, if it has moved")


def define_device() -> None:
    """Define where and in which dtype the model computes."""
    flags.DEFINE_enum(
        "compute", "auto", ["auto", "fp32", "fp16", "bf16"], "dtype of the matrix products; auto: what suits the device"
    )
    flags.DEFINE_enum(
        "devices", "auto", ["auto", "1", "2", "all"], "that share the model; auto: one if it fits there, else all"
    )


def define_sampling(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
) -> None:
    """Define how the next token is drawn, with these defaults; None: what the model's publisher advises."""
    flags.DEFINE_float("temperature", temperature, "0: always the likeliest token; 1: the model's own distribution")
    flags.DEFINE_integer("top_k", top_k, "draw from the k likeliest tokens only; 0: from all")
    flags.DEFINE_float(
        "top_p", top_p, "draw from the fewest likeliest tokens that add up to this probability; 1: from all"
    )
    flags.DEFINE_float("min_p", min_p, "draw from tokens at least this share as likely as the likeliest; 0: from all")
    flags.DEFINE_float(
        "repetition_penalty", repetition_penalty, "above 1, tokens that the text already holds get less likely"
    )
    flags.DEFINE_integer("seed", 1337, "another seed, another text", lower_bound=0, upper_bound=2**32 - 1)


def model_name() -> str:
    """Return --model; raise UserError where it was not given."""
    if not flags.FLAGS.model:
        raise UserError(
            "no --model was given. Allowed: a directory that training wrote, a Hugging Face model directory, or a name"
            " on its Hub. For example: --model runs/quickstart"
        )
    return flags.FLAGS.model


def sampling_given() -> dict[str, Any]:
    """Return how the next token is drawn, as far as the flags say; raise UserError for what is out of range."""
    from jgpt.inference.sampling import Sampling  # here: --help must not wait for JAX

    given: dict[str, Any] = {name: flags.FLAGS[name].value for name in SAMPLING if flags.FLAGS[name].value is not None}
    Sampling(**given).validate()
    return given


def loading() -> dict[str, Any]:
    """Return which state of the model to load, and where to, for `jgpt.load`."""
    args = flags.FLAGS
    return {"step": args.step, "compute": args.compute, "devices": args.devices, "base": args.base}
