"""A run directory, written as a Hugging Face model directory, as a file for llama.cpp, or as adapters for PEFT.

After training, in the data path: `jgpt.convert` is the caller.
"""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from jgpt.errors import UserError
from jgpt.exchange.gguf_file import check_gguf, write_gguf
from jgpt.exchange.hub import is_hub_name
from jgpt.exchange.model_card import Base, describe_base, of_adapter
from jgpt.exchange.new_directory import check_new
from jgpt.exchange.tensors import table
from jgpt.exchange.write_adapter import adapter_config, adapter_tensors, write_adapter
from jgpt.exchange.write_model import check_export, export_model
from jgpt.loading.source import Source, is_run, load_adapters, load_params, local_directory, open_source
from jgpt.model.precision import DTYPES
from jgpt.run_dir.identity import read_config


def export_run(run_dir: str, out: Path, *, step: int | None, base: str, dtype: str) -> tuple[str, str]:
    """Write the model of a run in `dtype` ("auto": the one it is kept in); return its family and its dtype.

    `step` is the checkpoint (None: the newest). Adapters are merged into their base, which may have moved to `base`.
    Raises UserError where `out` is taken, or no Hugging Face architecture holds the model.
    """
    source = open_source(run_dir, step, base=base)
    check_export(out, source.shapes)  # before the weights are loaded
    dtype = _kept_in(source) if dtype == "auto" else dtype
    family = export_model(
        out,
        load_params(source, DTYPES[dtype], lambda path, array: array),
        source.shapes,
        source.tokenizer,
        vocab_size=source.config.model.vocab_size or source.tokenizer.vocab_size,
        stop_ids=source.stop_ids,
        dtype=dtype,
        base=_base(source),
    )
    return family, dtype


def export_adapter(run_dir: str, out: Path, *, step: int | None, base: str, dtype: str) -> tuple[str, str, bool]:
    """Write the adapters of a LoRA run for PEFT, in `dtype` ("auto": fp32).

    Return the base's name or directory, the dtype, and whether the base is a run, which transformers does not open.

    Raises UserError for a run without adapters, and where `out` is taken.
    """
    source = open_source(run_dir, step, base=base)
    check_new(out)
    if source.base is None:
        raise UserError(
            f"{run_dir} holds no LoRA adapters, but all parameters of a model. Allowed: a run that was trained with"
            " lora.rank above 0. To write the whole model: python -m jgpt.convert export."
        )
    dtype = "fp32" if dtype == "auto" else dtype
    if source.peft is not None:
        raise UserError(
            f"{run_dir} holds adapters in PEFT's layout already. Allowed: a run that was trained with lora.rank above"
            " 0. To merge the adapters into their model: python -m jgpt.convert export."
        )
    family = source.base.family
    adapters, lora = load_adapters(source)
    began_from = _base(source)
    assert began_from is not None
    where = source.config.init_from if is_hub_name(source.config.init_from) else str(source.base.directory)
    tensors = dict(adapter_tensors(adapters, source.shapes, family))
    config = adapter_config(list(tensors), lora, family, where)
    card = of_adapter(
        out.name,
        family,
        config,
        n_params=sum(x.size for x in tensors.values()),
        dtype=jnp.dtype(DTYPES[dtype]).name,
        base=began_from,
        base_is_run=source.base.pretrained is None,
        is_chat="chat_template" in source.tokenizer.settings,
    )
    write_adapter(out, tensors, config, card, source.tokenizer, source.shapes.context_length, dtype)
    return where, dtype, source.base.pretrained is None


def _base(source: Source) -> Base | None:
    """Describe the model that a run began from, or that this one began from: the first that is no run of jgpt."""
    name = source.config.init_from
    directory = source.base.directory if source.base else local_directory(name) if name else None
    while directory is not None and is_run(directory) and (earlier := read_config(directory).init_from):
        name, directory = earlier, local_directory(earlier)
    return (
        describe_base(name if is_hub_name(name) or directory is None else str(directory), directory) if name else None
    )


def export_gguf(run_dir: str, out: Path, *, step: int | None, base: str, dtype: str) -> tuple[str, str]:
    """Write a model as the GGUF file `out`, as `export_run` writes a directory; return its family and its dtype.

    Raises UserError where llama.cpp is not known to compute the same, and for bf16.
    """
    source = open_source(run_dir, step, base=base)
    family = check_gguf(out, source.shapes, source.tokenizer)
    dtype = {"bf16": "fp16"}.get(kept := _kept_in(source), kept) if dtype == "auto" else dtype
    if dtype == "bf16":
        raise UserError("dtype=bf16, and GGUF files are written here in fp32 or fp16. Take --dtype=fp16.")
    vocab_size = source.config.model.vocab_size or source.tokenizer.vocab_size
    write_gguf(
        out,
        load_params(source, DTYPES[dtype], lambda path, array: array),
        list(table(family, replace(source.shapes, vocab_size=vocab_size))),
        source.shapes,
        source.tokenizer,
        family=family,
        vocab_size=vocab_size,
        stop_ids=source.stop_ids,
        dtype=dtype,
    )
    return family, dtype


def _kept_in(source: Source) -> str:
    """Return the dtype of a model's weights on disk; of LoRA adapters, that of the base they are merged into."""
    if source.base is not None:
        return _kept_in(source.base)
    return source.pretrained.dtype if source.pretrained is not None else source.config.precision.params
