"""Read LoRA adapters in the layout of PEFT, which `write_adapter.py` writes.

Beside the data path: `loading/source.py` opens such a directory with this, and merges the adapters into their base.
PEFT has a pair of matrices for each layer of transformers' model. Where several such layers are one of ours (query, key
and value; gate and up), the pairs stand beside each other: `a` has the columns of all, `b` is zero where they do not
meet. Pairs with a common lora_A, as jgpt writes them, share its columns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from jgpt.errors import UserError
from jgpt.exchange.hub import ADAPTER_CONFIG
from jgpt.exchange.keys import Keys
from jgpt.exchange.pretrained import read_json
from jgpt.exchange.read_weights import SAFETENSORS_DTYPES, Stored, read_header
from jgpt.exchange.tensors import Entry, Shape, prefix, table
from jgpt.exchange.write_adapter import WEIGHTS
from jgpt.model.lora import LoRA
from jgpt.model.shapes import ModelConfig

# What adapter_config.json may say. What is not allowed changes the function that is computed, or the base's weights.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "alora_invocation_tokens": ([], None),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),  # others change the base's weights
}


@dataclass(frozen=True)
class PeftAdapter:
    """A directory of PEFT's whose adapter_config.json and headers are checked; no weights are loaded."""

    directory: Path
    base: str  # a directory, or a name on the Hub; "": not named
    lora: LoRA  # its rank is that of each pair
    tensors: dict[str, Stored]


def open_adapter(directory: Path) -> PeftAdapter:
    """Open a directory with adapters of PEFT; raise UserError for what jgpt does not compute, and for damaged files."""
    keys = Keys(read_json(directory / ADAPTER_CONFIG), ADAPTER_CONFIG)
    try:
        for key, allowed in ALLOWED.items():
            keys.must_be(key, *allowed)
        rank, alpha = keys.count("r"), keys.number("lora_alpha")
        if keys.flag("use_rslora"):
            alpha *= math.sqrt(rank)  # the factor is alpha / sqrt(rank), that of LoRA alpha / rank
        base = keys.text("base_model_name_or_path")
    except UserError as error:
        raise UserError(f"{directory}: {error}{_merge_by_peft(directory)}") from None
    if not (directory / WEIGHTS).is_file():
        raise UserError(
            f"{directory} has {ADAPTER_CONFIG} and no {WEIGHTS}. Needed are both; pickles (.bin) are never opened,"
            " because they can run code. Save the adapter again where you trust it, with a version of peft that writes"
            " safetensors."
        )
    return PeftAdapter(directory, base, LoRA(rank, alpha), dict(read_header(directory / WEIGHTS)))


def check_adapter(adapter: PeftAdapter, shapes: ModelConfig, family: str) -> None:
    """Raise UserError, which lists the tensors, where adapters do not belong to a model of these shapes."""
    wanted = _wanted(adapter.lora.rank, shapes, family)
    found, wrong = adapter.tensors, []
    for name, stored in found.items():
        if name not in wanted:
            wrong.append(f"{name} {list(stored.shape)} is no adapter of its attention and MLP layers")
        elif stored.shape != wanted[name] or stored.dtype not in SAFETENSORS_DTYPES:
            wrong.append(
                f"{name} is {list(stored.shape)} of {stored.dtype} (wanted: {list(wanted[name])} of F32, F16 or BF16)"
            )
        elif _other(name) not in found:
            wrong.append(f"{_other(name)} is missing")
    if not found:
        wrong.append("it is empty")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{adapter.directory / WEIGHTS} does not fit its base, a {family} model:"
            f" {'; '.join(wrong[:5])}{more}. Allowed: pairs lora_A and lora_B on layers of that model, of rank"
            f" {adapter.lora.rank}. Name the right base by --base=DIR.{_merge_by_peft(adapter.directory)}"
        )


def load_adapter(adapter: PeftAdapter, shapes: ModelConfig, family: str) -> Any:
    """Load adapters that `check_adapter` passed: the tree that `model/lora.py` describes, fp32, on the host.

    The rank of a layer that joins several of PEFT's pairs is the sum of theirs.
    """
    stored = load_file(adapter.directory / WEIGHTS)
    tensors = {name: array.astype(np.float32) for name, array in stored.items()}
    tree: dict[str, Any] = {}
    for entry in table(family, shapes):
        layers = [_layer(name, family) for name in entry.names]
        if not any(f"{layer}.lora_A.weight" in tensors for layer in layers):
            continue
        place = tree
        for key in entry.path[:-1]:
            place = place.setdefault(key, {})
        place |= _join(entry, layers, tensors, family)
    return tree


def _join(entry: Entry, layers: list[str], tensors: Mapping[str, np.ndarray], family: str) -> dict[str, np.ndarray]:
    """Join the pairs of a parameter's layers: `a` [inputs, rank] and `b` [rank, *features]."""
    pairs = {
        i: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"])
        for i, layer in enumerate(layers)
        if f"{layer}.lora_A.weight" in tensors
    }
    first = next(iter(pairs.values()))[0]
    is_common = all(np.array_equal(a, first) for a, _ in pairs.values())
    groups = [pairs] if is_common else [{i: pair} for i, pair in pairs.items()]
    a = np.concatenate([next(iter(group.values()))[0].T for group in groups], axis=1)
    b = np.concatenate([_join_outputs(entry, group, len(first), family) for group in groups])
    return {"a": a, "b": b}


def _join_outputs(entry: Entry, pairs: Mapping[int, tuple[np.ndarray, np.ndarray]], rank: int, family: str) -> Any:
    """Join lora_B [outputs, rank] of a parameter's layers, zero for those without, to `b` [rank, *features]."""
    outputs = [shape[1 if family == "gpt2" else 0] for shape in entry.shapes]
    parts = [pairs[i][1] if i in pairs else np.zeros((n, rank), np.float32) for i, n in enumerate(outputs)]
    kernel = entry.join([part.T for part in parts] if family == "gpt2" else parts)
    return kernel.T if entry.path[-2] == "down" else kernel  # which is stored as [features, inputs]


def _wanted(rank: int, shapes: ModelConfig, family: str) -> dict[str, Shape]:
    """Return the shape of each tensor that an adapter to a model may have, by its name."""
    wanted: dict[str, Shape] = {}
    for entry in table(family, shapes):
        for name, shape in zip(entry.names, entry.shapes, strict=True):
            if entry.path[-1] == "kernel":
                outputs, inputs = shape[::-1] if family == "gpt2" else shape
                wanted[f"{_layer(name, family)}.lora_A.weight"] = (rank, inputs)
                wanted[f"{_layer(name, family)}.lora_B.weight"] = (outputs, rank)
    return wanted


def _layer(name: str, family: str) -> str:
    """Return the name that PEFT gives to the layer of a weight."""
    return f"base_model.model.{prefix(family)}{name.removesuffix('.weight')}"


def _other(name: str) -> str:
    return name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")


def _merge_by_peft(directory: Path) -> str:
    return (
        f" Where peft is installed, it may make one model of the two:"
        f" peft.AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).merge_and_unload()"
        ".save_pretrained(NEW_DIR); put the tokenizer's files beside it, and name NEW_DIR."
    )
