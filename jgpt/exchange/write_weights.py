"""Write weights as safetensors files, shard by shard.

Beside the data path: `write_model.py` and `write_adapter.py` write with this.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from jgpt.atomic_write import write_json
from jgpt.errors import UserError
from jgpt.exchange.cast import cast
from jgpt.exchange.read_weights import BAR, INDEX, SINGLE
from jgpt.exchange.tensors import Entry, full_name


def entry_bytes(entry: Entry, dtype: Any) -> int:
    """Return the bytes that a parameter's tensors take on disk in `dtype`."""
    return sum(math.prod(shape) for shape in entry.shapes) * np.dtype(dtype).itemsize


def save_params(
    directory: Path, params: Any, entries: Iterable[Entry], start: str, dtype: Any, shard_bytes: int
) -> None:
    """Write a parameter tree as safetensors files of `dtype`, each of at most `shard_bytes` or of one parameter.

    `entries` is the table of the layout, `start` the prefix of the names. One shard is on the host at a time.
    """
    shards: list[list[Entry]] = [[]]
    sizes = [0]
    for entry in entries:
        size = entry_bytes(entry, dtype)
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(entry)
        sizes[-1] += size
    weight_map = {}
    for i, shard in enumerate(tqdm(shards, "files", **BAR), 1):
        name = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {key: x for entry in shard for key, x in named_tensors(params, entry, dtype, start)}
        write_tensors(directory / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file that PyTorch's tools open. Raises UserError where it cannot be written."""
    path.touch()
    mode = path.stat().st_mode  # safetensors would make the file readable by its owner only
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without it
    except SafetensorError as error:  # in place of an OSError
        raise UserError(
            f"{path} could not be written: {error}. Make room, or name a directory on another disk, then run the same"
            " command again."
        ) from error
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def named_tensors(params: Any, entry: Entry, dtype: Any, start: str) -> Iterator[tuple[str, np.ndarray]]:
    """Return the names, with the prefix `start`, and the arrays of one parameter's tensors.

    A bias that the GPT does not have is zeros. Raises UserError for a value that fp16 cannot hold.
    """
    if not entry.in_model:
        arrays = [np.zeros(shape, dtype) for shape in entry.shapes]
    else:
        value = params
        for key in entry.path:
            value = value[key]
        value = np.asarray(value)
        if entry.path[0] in ("wte", "lm_head"):
            value = value[: entry.shapes[0][0]]  # without the rows that pad the vocabulary
        arrays = entry.split(value)
    for name, shape, array in zip(entry.names, entry.shapes, arrays, strict=True):
        assert array.shape == shape, (name, array.shape, shape)
        yield full_name(start, name), np.ascontiguousarray(cast(array, dtype, name))
