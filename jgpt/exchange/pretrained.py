"""Open Hugging Face model directories: everything is checked, and no weights are loaded.

Beside the data path: `loading/` and the convert command call it. A directory holds config.json,
generation_config.json, weights in safetensors and the tokenizer's files.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.config.defaults import KEYS
from jgpt.config.key import Key
from jgpt.data.first_bytes import why_unusable
from jgpt.data.published import load_pretrained
from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError
from jgpt.exchange.families import read_config
from jgpt.exchange.read_weights import Stored, find_tensors, load_params, main_dtype, match
from jgpt.exchange.tensors import table
from jgpt.model.parameters import PlaceParam
from jgpt.model.shapes import ModelConfig, model_config

log = logging.getLogger("jgpt")

# What generation_config.json may say of how tokens are drawn.
RULES = {name: KEYS[f"sample.{name}"] for name in ("temperature", "top_k", "top_p", "min_p")}
RULES |= {"repetition_penalty": Key(1.0, "above 1, what the text holds gets less likely", 0.01, 100)}


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

    def load_params(self, matrices: Any, place: PlaceParam) -> Any:
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
