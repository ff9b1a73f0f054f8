"""Write a model as a Hugging Face model directory: config.json, weights, tokenizer and model card.

Beside the data path: `loading/export.py` calls it. `pretrained.py` opens such directories.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.atomic_write import write_file, write_json
from jgpt.data.tokenizer import Tokenizer
from jgpt.exchange import model_card
from jgpt.exchange.families import export_family, write_config
from jgpt.exchange.model_card import Base
from jgpt.exchange.new_directory import check_new, new_directory
from jgpt.exchange.tensors import prefix, table
from jgpt.exchange.write_weights import entry_bytes, save_params
from jgpt.model.precision import DTYPES
from jgpt.model.shapes import ModelConfig

SHARD_BYTES = 5_000_000_000


def export_model(
    out: Path,
    params: Any,
    shapes: ModelConfig,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    stop_ids: tuple[int, ...],
    dtype: str,
    base: Base | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a model to the new directory `out`, in the layout of transformers; return its family.

    `params` is the parameter tree of the plain model. Weights are written in `dtype` ("fp32", "fp16", "bf16"), and of
    the embedding the first `vocab_size` rows. `stop_ids` are ids that end a text, beside the tokenizer's. `base` is the
    model that training began from, for the model card. `out` appears when it is complete, or not at all. Raises
    UserError when no Hugging Face architecture computes the model, `out` is not empty, or the disk is too small.
    """
    family = check_export(out, shapes)
    entries = list(table(family, replace(shapes, vocab_size=vocab_size)))
    with new_directory(out, sum(entry_bytes(entry, DTYPES[dtype]) for entry in entries)) as directory:
        tokenizer.save(directory, shapes.context_length)
        ids = _token_ids(tokenizer)
        config = write_config(family, shapes, vocab_size) | ids | {"dtype": jnp.dtype(DTYPES[dtype]).name}
        write_json(directory / "config.json", config)
        stops = list(dict.fromkeys((*stop_ids, tokenizer.eot_id)))
        generation = ids | {"eos_token_id": stops if len(stops) > 1 else stops[0]}
        write_json(directory / "generation_config.json", {**generation, "pad_token_id": _pad_id(ids)})
        save_params(directory, params, entries, prefix(family), DTYPES[dtype], shard_bytes)
        n_params = sum(int(x.size) for x in jax.tree.leaves(params))
        n_params -= (shapes.vocab_size - vocab_size) * shapes.d_model * (1 if shapes.tie_embeddings else 2)
        card = model_card.of_model(
            out.name, family, shapes, n_params=n_params, vocab_size=vocab_size, dtype=jnp.dtype(DTYPES[dtype]).name,
            base=base, is_chat="chat_template" in tokenizer.settings,
        )  # fmt: skip
        write_file(directory / "README.md", card)
    return family


def check_export(out: Path, shapes: ModelConfig) -> str:
    """Return the family that a model would be exported as; raise UserError when there is none or `out` is not empty."""
    check_new(out)
    return export_family(shapes)


def _token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the special ids of config.json. Without a token that begins texts, the one that ends them does both."""
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    for key in ("bos_token", "pad_token"):
        token = tokenizer.settings.get(key)
        token_id = tokenizer.backend.token_to_id(token) if isinstance(token, str) else None
        if token_id is not None and token_id < tokenizer.vocab_size:  # one without a row is no id of the model's
            ids[f"{key}_id"] = token_id
    return ids


def _pad_id(ids: dict[str, int]) -> int:
    return ids.get("pad_token_id", ids["eos_token_id"])  # transformers' generate() needs one
