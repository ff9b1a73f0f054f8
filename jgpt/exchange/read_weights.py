"""Read weights from safetensors files: the headers first, then tensor by tensor.

Beside the data path: `pretrained.py` opens and loads models with this. The safetensors library maps the files to
memory, and checks that headers and offsets agree with the file. No other format is opened, above all no pickle.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from jgpt.data.first_bytes import why_unusable
from jgpt.errors import UserError
from jgpt.exchange.cast import RESTORE, cast
from jgpt.exchange.tensors import BUFFERS, Entry, Shape, full_name, prefix
from jgpt.model.parameters import PlaceParam
from jgpt.model.precision import DTYPES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_DTYPES = {name.upper().replace("FP", "F"): name for name in DTYPES}  # F32, F16 and BF16 to our names
EMBEDDINGS = ("wte.weight", "embed_tokens.weight")
BAR: dict[str, Any] = {"disable": None, "delay": 2, "leave": False}  # tqdm: on a terminal only, after 2 seconds
LONGEST_NAME = 255  # bytes that a file system allows a file's name


class Stored(NamedTuple):
    """One tensor on disk: its place and its header."""

    file: Path
    name: str
    shape: Shape
    dtype: str  # in safetensors' words: "F16"


def find_tensors(directory: Path) -> dict[str, Stored]:
    """Read the headers of a model directory's safetensors files: each tensor by its full name.

    Raises UserError when a file is missing or damaged, or the files do not agree with their index.
    """
    if (directory / SINGLE).is_file():
        return {name: stored for name, stored in read_header(directory / SINGLE)}
    if not (directory / INDEX).is_file():
        raise UserError(_no_safetensors(directory))
    tensors: dict[str, Stored] = {}
    files = _read_index(directory / INDEX)
    for file in sorted(set(files.values())):
        path = directory / file
        if not os.path.isfile(path):  # unlike Path.is_file, it takes a name of any length
            raise UserError(
                f"{path} is missing, and {INDEX} names it. Needed are all files that the index names. {RESTORE}"
            )
        headers = dict(read_header(path))
        missing = [name for name, other in files.items() if other == file and name not in headers]
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} tensors that {INDEX} places in it, such as {missing[0]}. The files must"
                f" belong to one model. {RESTORE}"
            )
        tensors |= {name: stored for name, stored in headers.items() if files.get(name) == file}
    return tensors


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
        outside += [name for name in files.values() if len(name) > LONGEST_NAME]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} is not an index of safetensors files ({type(error).__name__}: {error}). It must be JSON with a"
            f" weight_map.{why_unusable(path) or f' {RESTORE}'}"
        ) from None
    if outside:
        raise UserError(
            f"{path} names the file {outside[0][:LONGEST_NAME]!r}. Allowed are .safetensors files beside the index, by"
            " name alone. Do not use this model: no tool writes such an index."
        )
    return files


def read_header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Yield each tensor of a safetensors file by its name; raise UserError for a damaged file."""
    with _open(path) as file:
        for name in file.keys():
            part = file.get_slice(name)
            yield name, Stored(path, name, tuple(part.get_shape()), part.get_dtype())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}). It must have all bytes that its header describes."
            f"{why_unusable(path) or f' {RESTORE}'}"
        ) from None


def match(tensors: Mapping[str, Stored], entries: Iterable[Entry], family: str, tied: bool) -> dict[str, Stored]:
    """Return the tensors that `entries` need, by their names without the family's prefix.

    `tied` says that the output layer is the embedding. Raises one UserError that lists the tensors that are missing, of
    a wrong shape or dtype, or not part of such a model.
    """
    start = prefix(family)
    short = {name.removeprefix(start): stored for name, stored in tensors.items()}
    wanted = {name: shape for entry in entries for name, shape in zip(entry.names, entry.shapes, strict=True)}
    missing = [name for name in wanted if name not in short]
    wrong = [f"{full_name(start, name)} is missing (wanted: {list(wanted[name])})" for name in missing]
    for name, stored in short.items():
        if name in wanted and stored.shape != wanted[name]:
            wrong.append(f"{stored.name} is {list(stored.shape)} (wanted: {list(wanted[name])})")
        elif name in wanted and stored.dtype not in SAFETENSORS_DTYPES:
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


def main_dtype(tensors: Mapping[str, Stored]) -> str:
    """Return the dtype of most tensors: "fp32", "fp16" or "bf16"."""
    return SAFETENSORS_DTYPES[Counter(stored.dtype for stored in tensors.values()).most_common(1)[0][0]]


def load_params(
    tensors: Mapping[str, Stored],
    entries: Iterable[Entry],
    matrices: Any,
    place: PlaceParam,
    *,
    tied: bool,
) -> Any:
    """Load the parameter tree, one parameter at a time; `tensors` are those that `match` returned for `entries`.

    Matrices (weights, embeddings) are converted to the dtype `matrices`, vectors (norms, biases) to fp32. `place` takes
    each parameter's path in the tree and its array, and returns the leaf. Never more than one parameter is on the host,
    beside the pages of the files that it is in. Raises UserError for a value that fp16 cannot hold, and for an output
    layer that differs from the embedding where they are `tied`.
    """
    params: dict[str, Any] = {}
    if tied:
        _check_tied(tensors)
    files: dict[Path, Any] = {}
    with ExitStack() as stack:
        for entry in tqdm(list(entries), "weights", **BAR):
            stored = [tensors[name] for name in entry.names]
            if not {one.file for one in stored} <= files.keys():  # open the next shard, close the others
                stack.close()
                files = {path: stack.enter_context(_open(path)) for path in {one.file for one in stored}}
            # The biases of fused layers count as matrices, because as parameters they have more than one axis.
            is_matrix = len(entry.shapes[0]) > 1 or entry.path[-2] in ("qkv", "gate_up")
            dtype = matrices if is_matrix else np.float32
            parts = [cast(files[one.file].get_tensor(one.name), dtype, f"{one.name} in {one.file}") for one in stored]
            if entry.in_model:
                _put(params, entry.path, place(entry.path, entry.join(parts)))
            elif np.any(parts[0]):
                raise UserError(
                    f"{stored[0].name} is not zero. Allowed: zeros, because a model of jgpt has this bias only when all"
                    " its layers have one. Take another model."
                )
    return params


def _check_tied(tensors: Mapping[str, Stored]) -> None:
    """Refuse an output layer that differs from the embedding, where config.json says that they are the same."""
    if "lm_head.weight" not in tensors:
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
