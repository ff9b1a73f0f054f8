"""A model on disk by its name: found, checked and described; then loaded, parameter by parameter.

Beside the data path: a run's directory, or a Hugging Face model's, in; a tree of parameters, each placed where its
reader wants it, out. What `init_from` begins from, and what `load.py` loads.
"""

import hashlib
import os.path
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.config.files import user_path
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.errors import UserError
from jgpt.exchange.hub import locate
from jgpt.exchange.pretrained import Pretrained, open_pretrained
from jgpt.model.lora import LoRA, lora_config, merge
from jgpt.model.parameters import abstract_adapters, abstract_stored
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.run_dir.identity import check_tokenizer, read_config
from jgpt.run_dir.manifest import read_meta, whole_steps
from jgpt.run_dir.params import restore_params

Place = Callable[[tuple[str, ...], np.ndarray], Any]  # (a parameter's keys in the tree, its values) -> where it belongs
EDGE = 1 << 20  # bytes of a file's beginning and of its end that a fingerprint reads


@dataclass(frozen=True)
class Source:
    """A model on disk, opened and not loaded."""

    directory: Path
    config: ConfigDict  # of its run; of a model of others the defaults, with its `model` and `tokenizer`
    shapes: ModelConfig
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    fingerprint: str  # of the files: the same model wherever it is moved
    step: int | None = None  # a run's checkpoint
    val_loss: float | None = None
    base: "Source | None" = None  # what the adapters of a LoRA run belong to
    pretrained: Pretrained | None = None

    @property
    def sampling(self) -> dict[str, float]:
        """The temperature and the like that its publisher advises, where any."""
        source = self.base or self
        return source.pretrained.sampling if source.pretrained else {}


def is_run(directory: Path) -> bool:
    """Tell a run directory, whether it has saved or not, from one of Hugging Face's layout."""
    return (directory / "checkpoints").is_dir() or (directory / "status.json").is_file()


def local_directory(name: str) -> Path | None:
    """Return the directory that a model's name is; None where it is none, and may be a name on the Hub."""
    path = user_path(name).absolute()
    return path if os.path.isdir(path) else None  # unlike Path.is_dir, it takes a name of any length


def open_source(name: str, step: int | None = None, fingerprint: str = "", base: str = "") -> Source:
    """Find a model by its name and check all that can be known before it is loaded.

    `name` is a run directory, a Hugging Face directory, or a name on its Hub. Of a run it is the newest whole
    checkpoint, or that at `step`, or that of a `fingerprint`. `base` is where the base model of a LoRA run is, if not
    where it was trained from. Raises UserError when there is no such model.
    """
    directory = local_directory(name)
    if directory is not None and is_run(directory):
        return _open_run(directory, step, fingerprint, base)
    if step is not None:
        raise UserError(f"a step was given, and {name} is no run directory, which alone has several. Leave it out.")
    source = describe(open_pretrained(locate(name)))
    _same_files(source.directory, source.fingerprint, fingerprint)
    return source


def _open_run(run_dir: Path, step: int | None, fingerprint: str, base: str) -> Source:
    checkpoints = run_dir / "checkpoints"
    steps = whole_steps(checkpoints)
    if not (run_dir / "config.json").is_file() or not steps:
        raise UserError(
            f"{run_dir} holds no trained model: it needs config.json, tokenizer/ and a whole checkpoint in"
            " checkpoints/. Name the out_dir of a run that has saved at least once."
        )
    if step is not None and step not in steps:
        raise UserError(
            f"step {step} is not among the checkpoints of {run_dir}. Allowed: {', '.join(map(str, steps))}."
        )
    prints = {n: hashlib.sha256((checkpoints / f"{n}.sha256").read_bytes()).hexdigest() for n in steps}
    with_print = [n for n in steps if prints[n] == fingerprint]
    step = step if step is not None else with_print[0] if with_print else steps[-1]
    _same_files(run_dir, prints[step], fingerprint)
    meta = read_meta(checkpoints, step)
    check_tokenizer(run_dir / "tokenizer", step, meta)
    config, tokenizer = read_config(run_dir), load_tokenizer(run_dir / "tokenizer")
    return Source(
        directory=run_dir,
        config=config,
        shapes=model_config(config.model, tokenizer.vocab_size),
        tokenizer=tokenizer,
        stop_ids=tuple(meta.get("stop_ids") or [tokenizer.eot_id]),
        fingerprint=prints[step],
        step=step,
        val_loss=meta.get("val_loss"),
        base=_open_base(run_dir, config.init_from, meta.get("base") or "", base) if config.lora.rank else None,
    )


def _open_base(run_dir: Path, init_from: str, fingerprint: str, base: str) -> Source:
    try:
        return open_source(base or init_from, fingerprint=fingerprint)
    except UserError as error:
        raise UserError(
            f"{run_dir} holds LoRA adapters, and the model that they belong to was looked for at {base or init_from}:"
            f" {error} Say where it is now by --base=DIR, or correct init_from in {run_dir / 'config.json'}."
        ) from None


def _same_files(directory: Path, found: str, expected: str) -> None:
    if expected and found != expected:
        raise UserError(
            f"{directory} holds another model than the one that this run began from: its files differ. Only that"
            " one will do. Name the directory where it is."
        )


def describe(pretrained: Pretrained) -> Source:
    """Return a model of others as a source."""
    tokenizer, config = pretrained.tokenizer(), default_config()
    config.model = pretrained.model
    config.tokenizer.update({"kind": "hf", "pretrained": str(pretrained.directory)})
    return Source(
        directory=pretrained.directory,
        config=config,
        shapes=model_config(config.model, tokenizer.vocab_size),
        tokenizer=tokenizer,
        stop_ids=pretrained.stop_ids or (tokenizer.eot_id,),
        fingerprint=_fingerprint(pretrained.directory),
        pretrained=pretrained,
    )


def _fingerprint(directory: Path) -> str:
    """Digest config.json, and of each safetensors file its name, its size, its first and its last MiB."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def load_params(source: Source, matrices: Any, place: Place) -> Any:
    """Load the parameters through `place`: matrices in the dtype `matrices`, vectors in fp32, adapters merged."""
    if source.pretrained is not None:
        return source.pretrained.load_params(matrices, place)
    assert source.step is not None
    checkpoints = source.directory / "checkpoints"
    if source.base is None:
        abstract = abstract_stored(source.shapes, matrices)
        return restore_params(checkpoints, source.step, abstract, lambda path, x: place(path, _in_range(path, x)))
    adapters, lora = load_adapters(source)
    return load_params(
        source.base, matrices, lambda path, x: place(path, _in_range(path, merge(path, x, adapters, lora)))
    )


def load_adapters(source: Source) -> tuple[Any, LoRA]:
    """Load the adapters of a LoRA run alone, fp32, on the host, and their settings."""
    lora = lora_config(source.config.lora)
    assert lora is not None and source.step is not None
    checkpoints, abstract = source.directory / "checkpoints", abstract_adapters(source.shapes, lora)
    return restore_params(checkpoints, source.step, abstract, lambda path, array: array), lora


def _in_range(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float16 and not np.isfinite(array).all():
        raise UserError(
            f"{'/'.join(path)} does not fit in fp16, which ends at 65504. Take bf16 on a TPU or on a"
            " GPU of compute capability 8.0 or more, or fp32."
        )
    return array
