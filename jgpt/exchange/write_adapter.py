"""Write LoRA adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

Beside the data path: `loading/export.py` calls it. The names are those that PEFT gives to the layers of transformers'
model (peft/utils/save_and_load.py). A fused layer of ours (query, key and value; gate and up) has one `a` for all its
parts; as PEFT has a pair for each layer, every part gets the same lora_A, and its own rows of lora_B. So the product is
exactly ours. GPT-2's layers are fused in transformers as well, and stored as [inputs, outputs] (fan_in_fan_out); PEFT's
pairs are [rank, inputs] and [outputs, rank] all the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jgpt.atomic_write import write_file, write_json
from jgpt.data.tokenizer import Tokenizer
from jgpt.exchange.cast import cast
from jgpt.exchange.hub import ADAPTER_CONFIG
from jgpt.exchange.new_directory import new_directory
from jgpt.exchange.tensors import Entry, prefix, table
from jgpt.exchange.write_weights import write_tensors
from jgpt.model.lora import LoRA
from jgpt.model.precision import DTYPES
from jgpt.model.shapes import ModelConfig

WEIGHTS = "adapter_model.safetensors"


def write_adapter(
    out: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    card: str,
    tokenizer: Tokenizer,
    context_length: int,
    dtype: str,
) -> None:
    """Write adapters to the new directory `out` in `dtype`, with the tokenizer and the model card.

    `out` appears when it is complete, or not at all. Raises UserError for a value that fp16 cannot hold, and for a full
    disk.
    """
    arrays = {name: cast(x, DTYPES[dtype], name) for name, x in tensors.items()}
    with new_directory(out, sum(x.nbytes for x in arrays.values())) as directory:
        tokenizer.save(directory, context_length)
        write_json(directory / ADAPTER_CONFIG, config)
        write_tensors(directory / WEIGHTS, arrays)
        write_file(directory / "README.md", card)


def adapter_tensors(adapters: Any, shapes: ModelConfig, family: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and the arrays of PEFT's pairs: lora_A [rank, inputs] and lora_B [outputs, rank], fp32."""
    for entry in table(family, shapes):
        adapter = adapters
        for key in entry.path[:-1]:
            adapter = adapter.get(key, {})
        if entry.path[-1] != "kernel" or "a" not in adapter:
            continue
        a, b = (np.asarray(adapter[name], np.float32) for name in ("a", "b"))
        for name, part in zip(entry.names, _split(entry, b, family), strict=True):
            layer = f"base_model.model.{prefix(family)}{name.removesuffix('.weight')}"
            yield f"{layer}.lora_A.weight", np.ascontiguousarray(a.T)
            yield f"{layer}.lora_B.weight", np.ascontiguousarray(part)


def _split(entry: Entry, b: np.ndarray, family: str) -> list[np.ndarray]:
    """Split `b` [rank, *features] as a kernel of `rank` inputs is split: one [outputs, rank] for each tensor."""
    kernel = b.T if entry.path[-2] == "down" else b  # which is stored as [features, inputs]
    parts = entry.split(kernel)
    return [part.T for part in parts] if family == "gpt2" else parts


def adapter_config(names: list[str], lora: LoRA, family: str, base: str) -> dict[str, Any]:
    """Return what adapter_config.json says of adapters with tensors of these names."""
    layers = (name.removesuffix(".lora_A.weight").split(".") for name in names if name.endswith("lora_A.weight"))
    # GPT-2 has two layers that are called c_proj; PEFT compares the ends of names.
    targets = {".".join(layer[-2:]) if layer[-1] == "c_proj" else layer[-1] for layer in layers}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "fan_in_fan_out": family == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }
