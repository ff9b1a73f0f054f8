"""Open and write Hugging Face model directories; opening checks everything and loads no weights.

Beside the data path: `loading/` and the convert command call it. A directory holds config.json,
generation_config.json, weights in safetensors and the tokenizer's files.
"""

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jgpt.atomic_write import atomic_directory, write_file
from jgpt.config.defaults import KEYS
from jgpt.config.key import Key
from jgpt.data.first_bytes import why_unusable
from jgpt.data.published import load_pretrained
from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError
from jgpt.exchange import model_card
from jgpt.exchange.families import export_family, read_config, write_config
from jgpt.exchange.model_card import Base
from jgpt.exchange.tensors import prefix, table
from jgpt.exchange.weights import Stored, entry_bytes, find_tensors, load_params, main_dtype, match, save_params
from jgpt.model.precision import DTYPES
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.wording import json_text

log = logging.getLogger("jgpt")

SHARD_BYTES = 5_000_000_000
# What generation_config.json may say of how tokens are drawn.
RULES = {name: KEYS[f"sample.{name}"] for name in ("temperature", "top_k", "top_p", "min_p")}
RULES |= {"repetition_penalty": Key(1.0, "above 1, what the text holds gets less likely", 0.01, 100)}

# Not ENOTEMPTY, which another process leaves, nor a full disk.
OF_THE_PLACE = (errno.EACCES, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Pretrained:
    """A model directory whose config.json and headers are checked; no weights are loaded."""

    directory: Path
    family: str  # "gpt2", "llama", "mistral", "qwen2", "qwen3"
    model: ConfigDict  # the values of config.model, all filled in
    shapes: ModelConfig
    tensors: dict[str, Stored]  # by their names in `tensors.py`
    stop_ids: tuple[int, ...]  # the ids that end a text, from config.json and generation_config.json
    dtype: str  # of most weights: "fp32", "fp16", "bf16"
    sampling: dict[str, float]  # temperature and the like, where generation_config.json has any

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer; raise UserError when it has more ids than the model has rows."""
        tokenizer = load_pretrained(str(self.directory))
        check_vocabulary(tokenizer, self.shapes, self.directory)
        return tokenizer

    def load_params(self, matrices: Any, place: Callable[[tuple[str, ...], np.ndarray], Any]) -> Any:
        """Load the parameter tree, as `weights.load_params` does: matrices in the dtype `matrices`, vectors in fp32.

        Raises UserError, see there.
        """
        entries = table(self.family, self.shapes)
        return load_params(self.tensors, entries, matrices, place, tied=self.shapes.tie_embeddings)


def check_vocabulary(tokenizer: Tokenizer, shapes: ModelConfig, directory: Path) -> None:
    """Raise UserError when the tokenizer in `directory` has more ids than the model has rows."""
    if tokenizer.vocab_size > shapes.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, and the model's embedding"
            f" {shapes.vocab_size} rows: it needs a row for each. Take the tokenizer and the weights from the same"
            " place."
        )


def open_pretrained(directory: Path) -> Pretrained:
    """Open a model directory; raise UserError, with its name, when a file is missing, damaged or of another model."""
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} has no config.json. It must be a Hugging Face model directory: config.json, weights in"
            " safetensors, a tokenizer. Name the directory that holds them."
        )
    config = read_json(directory / "config.json")
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    try:
        family, model = read_config(config)
        shapes = model_config(model, 0)
        tensors = match(find_tensors(directory), table(family, shapes), family, shapes.tie_embeddings)
    except UserError as error:
        text = str(error)
        raise UserError(text if str(directory) in text else f"{directory}: {text}") from None
    published = {directory / "config.json": config, path: generation}
    stops = dict.fromkeys(i for file, values in published.items() for i in _eos_ids(file, values, shapes.vocab_size))
    sampling = _sampling(path, generation)
    return Pretrained(directory, family, model, shapes, tensors, tuple(stops), main_dtype(tensors), sampling)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a publisher wrote; raise UserError where a file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reason = type(content).__name__
    except (ValueError, OSError, RecursionError) as error:
        content, reason = None, str(error)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a JSON object ({reason}). It must be the file that its publisher wrote."
            f"{why_unusable(path) or ' Download it again.'}"
        )
    return content


def _eos_ids(path: Path, published: dict[str, Any], n_rows: int) -> list[int]:
    """Return the ids that end a text, as a file says; what the model cannot write is left out, and named."""
    ids = published.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    right = [i for i in ids if type(i) is int and 0 <= i < n_rows]
    if left_out := [i for i in ids if i not in right]:
        log.warning("%s: eos_token_id %.80r is left out: it is no id of the model's %d", path, left_out, n_rows)
    return right


def _sampling(path: Path, generation: dict[str, Any]) -> dict[str, float]:
    """Return how to draw tokens, as generation_config.json advises; what cannot be is left out, and named.

    A null is as if the key were not there, and a top_k of -1 is 0: all tokens.
    """
    found: dict[str, float] = {}
    for name, rule in RULES.items():
        value: Any = generation.get(name)
        if name == "top_k":
            value = 0 if value == -1 else int(value) if isinstance(value, float) and value.is_integer() else value
        if value is None:
            continue
        if rule.allows(value) and not (name == "temperature" and 0 < value < 1e-6):
            found[name] = value
        else:
            log.warning("%s: %s=%.80r is left out: it must be %s", path, name, value, rule.allowed(in_full=True))
    return found


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


def check_new(out: Path) -> None:
    """Raise UserError where `out` is not the name of a new or an empty directory."""
    with place_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not empty. Allowed: a new directory, or an empty one. Name another.")


@contextmanager
def place_errors(out: Path) -> Iterator[None]:
    """Turn an error about the name of `out`, or about the place where it would be, into a UserError.

    An error about another file, such as weights that cannot be read, stays as it is.
    """
    try:
        yield
    except OSError as error:
        named = str(error.filename or "")  # `out`, a temporary name that begins so, or a directory above
        is_there = named and (named.startswith(str(out)) or Path(named) in out.parents)
        if error.errno not in OF_THE_PLACE or not is_there or error.filename2:  # two names: another process was there
            raise
        raise UserError(
            f"{out} cannot be made: {error.strerror}. Allowed: a name in a directory that you may write in. Name"
            " another."
        ) from None


@contextmanager
def new_directory(out: Path, planned: int) -> Iterator[Path]:
    """Yield a temporary directory for `planned` bytes: it becomes `out` at the end, and is removed on an error."""
    with place_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    if planned > free:
        raise UserError(
            f"the model takes {planned / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {out.parent}. Make room, name"
            " a directory on another disk, or export with --dtype=fp16."
        )
    try:
        with place_errors(out), atomic_directory(out) as directory:
            yield directory
    except OSError as error:
        if error.filename2 != str(out):  # it is not about the new name
            raise
        raise UserError(f"{out} cannot be made: {error.strerror}. Another process wrote there. Name another.") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object for people to read."""
    write_file(path, json_text(content) + "\n")


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
