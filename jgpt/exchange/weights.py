"""Weights in safetensors files: headers first, then tensor by tensor in, and shard by shard out.

Beside the data path: `pretrained.py` opens and writes whole models. The files are memory-mapped by the safetensors
library, which checks that headers and offsets agree with the file; nothing else is read, and no pickle ever.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from jgpt.atomic_write import write_file
from jgpt.errors import UserError
from jgpt.exchange.tensors import BUFFERS, Entry, Shape, prefix, table

if TYPE_CHECKING:
    from jgpt.exchange.pretrained import Pretrained

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
EMBEDDINGS = ("wte.weight", "embed_tokens.weight")
BAR: dict[str, Any] = {"disable": None, "delay": 2, "leave": False}  # on a terminal, where it takes long
RESTORE = "Download it again, or restore the file."


class Stored(NamedTuple):
    """Where one tensor is."""

    file: Path
    name: str
    shape: Shape
    dtype: str  # as safetensors calls it


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Read the headers of a model directory's safetensors; raise UserError where they are not whole."""
    if (directory / SINGLE).is_file():
        return {name: stored for name, stored in _read_header(directory / SINGLE)}
    if not (directory / INDEX).is_file():
        raise UserError(_no_safetensors(directory))
    found: dict[str, Stored] = {}
    files = _read_index(directory / INDEX)
    for file in sorted(set(files.values())):
        path = directory / file
        if not path.is_file():
            raise UserError(
                f"{path} is missing, and {INDEX} names it. Needed are all files that the index names. {RESTORE}"
            )
        headers = dict(_read_header(path))
        missing = [name for name, other in files.items() if other == file and name not in headers]
        if missing:
            raise UserError(
                f"{path} has no tensor {missing[0]}, and {INDEX} says that it has ({len(missing)} such). The files must"
                f" be of one model. {RESTORE}"
            )
        found |= {name: stored for name, stored in headers.items() if files.get(name) == file}
    return found


def _no_safetensors(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    there = f", only {', '.join((pickles + shards)[:3])}" if pickles or shards else ""
    if shards:
        return f"{directory} has no {SINGLE} and no {INDEX}{there}. One of them is needed. {RESTORE}"
    return (
        f"{directory} has no weights in safetensors{there}. Needed is {SINGLE}, or shards and {INDEX}; pickles (.bin,"
        " .pt) are never opened, because they can run code. Convert them where you trust them:"
        " transformers.AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)."
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor; files are plain names, so that an index cannot point out of its directory."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name in files.values() if Path(name).name != name or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no index of safetensors ({type(error).__name__}: {error}). It must be JSON with a weight_map."
            f" {RESTORE}"
        ) from None
    if outside:
        raise UserError(
            f"{path} names the file {outside[0]!r}. Allowed are .safetensors files beside the index, by name alone. Do"
            " not use this model: no tool writes such an index."
        )
    return files


def _read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    with _open(path) as file:
        for name in file.keys():
            part = file.get_slice(name)
            yield name, Stored(path, name, tuple(part.get_shape()), part.get_dtype())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no whole safetensors file ({error}). It must have every byte that its header names. {RESTORE}"
        ) from None


def match(found: Mapping[str, Stored], entries: Iterable[Entry], family: str, tied: bool) -> dict[str, Stored]:
    """Give each tensor that `entries` name its place on disk; raise one UserError that lists all that do not fit."""
    start = prefix(family)
    short = {name.removeprefix(start): stored for name, stored in found.items()}
    wanted = {name: shape for entry in entries for name, shape in zip(entry.names, entry.shapes, strict=True)}
    missing = [name for name in wanted if name not in short]
    wrong = [f"{_full(start, name)} is missing (wanted: {list(wanted[name])})" for name in missing]
    for name, stored in short.items():
        if name in wanted and stored.shape != wanted[name]:
            wrong.append(f"{stored.name} is {list(stored.shape)} (wanted: {list(wanted[name])})")
        elif name in wanted and stored.dtype not in DTYPES:
            wrong.append(f"{stored.name} is of dtype {stored.dtype} (wanted: F32, F16 or BF16)")
        elif name not in wanted and not BUFFERS.fullmatch(name) and not (tied and name == "lm_head.weight"):
            wrong.append(f"{stored.name} {list(stored.shape)} has no place in a {family} model")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"the weights are not those of config.json's {family} model: {'; '.join(wrong[:5])}{more}. Every tensor"
            " must be there once, in its shape. Take config.json and the weights from the same place."
        )
    return {name: stored for name, stored in short.items() if name in wanted or name == "lm_head.weight"}


def _full(start: str, name: str) -> str:
    return name if name.startswith("lm_head") else start + name


def main_dtype(tensors: Mapping[str, Stored]) -> str:
    """Return the dtype that most tensors have, "fp32", "fp16" or "bf16"."""
    return DTYPES[Counter(stored.dtype for stored in tensors.values()).most_common(1)[0][0]]


def load_params(
    pretrained: "Pretrained", matrices: Any, vectors: Any, place: Callable[[tuple[str, ...], np.ndarray], Any]
) -> Any:
    """Load the parameter tree, one parameter at a time: arrays of more than one axis in `matrices`, the others in
    `vectors`, each handed to `place` with its path in the tree.

    On the host are never more than one parameter, and the pages of the files that it is in. Raises UserError for a
    value that fp16 cannot hold.
    """
    params: dict[str, Any] = {}
    tensors = pretrained.tensors
    _check_tied(tensors, pretrained.shapes.tie_embeddings)
    files: dict[Path, Any] = {}
    with ExitStack() as stack:
        entries = list(table(pretrained.family, pretrained.shapes))
        for entry in tqdm(entries, "weights", **BAR):
            stored = [tensors[name] for name in entry.names]
            if not {one.file for one in stored} <= files.keys():  # on to the next shard, and away with those before
                stack.close()
                files = {path: stack.enter_context(_open(path)) for path in {one.file for one in stored}}
            many = len(entry.shapes[0]) > 1 or entry.path[-2] in ("qkv", "gate_up")  # whose biases have several axes
            dtype = matrices if many else vectors
            parts = [_cast(files[one.file].get_tensor(one.name), dtype, f"{one.name} in {one.file}") for one in stored]
            if entry.there:
                _put(params, entry.path, place(entry.path, entry.join(parts)))
            elif np.any(parts[0]):
                raise UserError(
                    f"{stored[0].name} is not zero. A model of jgpt has this bias only together with those of all"
                    " layers. Take another model."
                )
    return params


def _check_tied(tensors: Mapping[str, Stored], tied: bool) -> None:
    """Refuse an output layer of its own where config.json says that it is the embedding."""
    if not tied or "lm_head.weight" not in tensors:
        return
    output, embedding = tensors["lm_head.weight"], next(tensors[x] for x in tensors if x in EMBEDDINGS)
    with _open(output.file) as file, _open(embedding.file) as other:
        if not np.array_equal(file.get_tensor(output.name), other.get_tensor(embedding.name)):
            raise UserError(
                "config.json says that the output layer is the embedding (tie_word_embeddings), and the file has a"
                " lm_head.weight that differs from it. They must be the same. Set tie_word_embeddings to false in"
                " config.json if the file is right."
            )


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == jnp.float16 and not np.all(np.isfinite(cast)):
        largest = np.max(np.abs(array.astype(np.float32)))
        if not np.isfinite(largest):
            raise UserError(f"{name} holds {largest}, which is no weight: it must be all numbers. {RESTORE}")
        raise UserError(
            f"{name} does not fit in fp16: its largest value is {largest:g}, and fp16 ends at 65504. Take bf16 on a GPU"
            " of sm_80 or newer, else fp32."
        )
    return cast


def entry_bytes(entry: Entry, dtype: Any) -> int:
    """Return the bytes of a parameter's tensors."""
    return sum(math.prod(shape) for shape in entry.shapes) * np.dtype(dtype).itemsize


def save_params(
    directory: Path, params: Any, entries: Iterable[Entry], start: str, dtype: Any, shard_bytes: int
) -> None:
    """Write a parameter tree as safetensors, in shards of at most `shard_bytes` (a parameter may be larger).

    `entries` is the table of the layout, `start` what their names begin with. One shard is on the host at a time.
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
        tensors = {_full(start, key): x for entry in shard for key, x in _tensors(params, entry, dtype)}
        _write(directory / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_file(directory / INDEX, json.dumps(index, indent=2) + "\n")


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors would let the owner alone read it
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without it
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _tensors(params: Any, entry: Entry, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Return the tensors that one parameter is in their files; a bias that the GPT has not is zeros."""
    if not entry.there:
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
        yield name, np.ascontiguousarray(_cast(array, dtype, name))
