"""A run directory, written as a Hugging Face model directory.

After training, in the data path: `jgpt.convert` is the caller.
"""

from dataclasses import replace
from pathlib import Path

from jgpt.errors import UserError
from jgpt.exchange.gguf_file import check_gguf, write_gguf
from jgpt.exchange.pretrained import check_export, export_model
from jgpt.exchange.tensors import table
from jgpt.loading.source import Source, load_params, open_source
from jgpt.model.precision import DTYPES


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
    )
    return family, dtype


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
