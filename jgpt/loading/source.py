"""A model on disk by its name: found, checked and described; then loaded, parameter by parameter.

Beside the data path: a run's directory, or a Hugging Face model's, in; a tree of parameters, each placed where its
reader wants it, out. What `init_from` begins from, and what `load.py` loads.
"""

import hashlib
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.config.files import user_path
from jgpt.data.published import load_pretrained
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.errors import UserError
from jgpt.exchange.families import export_family
from jgpt.exchange.hub import ADAPTER_CONFIG, is_adapter, locate
from jgpt.exchange.pretrained import Pretrained, check_vocabulary, open_pretrained
from jgpt.exchange.read_adapter import PeftAdapter, check_adapter, load_adapter, open_adapter
from jgpt.model.lora import LoRA, lora_config, merge
from jgpt.model.parameters import PlaceParam, abstract_adapters, abstract_stored
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.run_dir.identity import check_tokenizer, read_config
from jgpt.run_dir.manifest import read_meta, whole_steps
from jgpt.run_dir.params import restore_params

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
    base: "Source | None" = None  # what adapters belong to
    pretrained: Pretrained | None = None
    peft: PeftAdapter | None = None  # adapters to `base` in the layout of others

    @property
    def sampling(self) -> dict[str, float]:
        """The temperature and the like that its publisher advises, where any."""
        if self.base is not None:
            return self.base.sampling
        return self.pretrained.sampling if self.pretrained else {}

    @property
    def tokenizer_directory(self) -> str:
        """Where the files of its tokenizer are."""
        return str(self.directory / "tokenizer") if is_run(self.directory) else self.config.tokenizer.pretrained

    @property
    def family(self) -> str:
        """The Hugging Face architecture that names its weights; raises UserError where none computes the model."""
        return self.pretrained.family if self.pretrained else export_family(self.shapes)


def is_run(directory: Path) -> bool:
    """Tell a run directory, whether it has saved or not, from one of Hugging Face's layout."""
    return (directory / "checkpoints").is_dir() or (directory / "status.json").is_file()


def local_directory(name: str) -> Path | None:
    """Return the directory that a model's name is; None where it is none, and may be a name on the Hub."""
    path = user_path(name).absolute()
    return path if os.path.isdir(path) else None  # unlike Path.is_dir, it takes a name of any length


def open_source(name: str, step: int | None = None, fingerprint: str = "", base: str = "") -> Source:
    """Find a model by its name and check all that can be known before it is loaded.

    `name` is a run directory, a Hugging Face directory (of a model, or of adapters in PEFT's layout), or a name on its
    Hub. Of a run it is the newest whole checkpoint, or that at `step`, or that of a `fingerprint`. `base` is where the
    base model of adapters is, if not where it was when they were trained. Raises UserError when there is no such model.
    """
    directory = local_directory(name)
    if directory is not None and is_run(directory):
        return _open_run(directory, step, fingerprint, base)
    if step is not None:
        raise UserError(f"a step was given, and {name} is no run directory, which alone has several. Leave it out.")
    directory = locate(name)
    source = _open_peft(directory, base) if is_adapter(directory) else source_of(open_pretrained(directory))
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
        correct = f"init_from in {run_dir / 'config.json'}"
        raise UserError(_no_base(run_dir, base or init_from, error, correct)) from None


def _no_base(directory: Path, base: str, error: UserError, correct: str) -> str:
    return (
        f"{directory} holds LoRA adapters, and the model that they belong to was looked for at {base}: {error} Say"
        f" where it is now by --base=DIR, or correct {correct}."
    )


def _open_peft(directory: Path, moved_to: str) -> Source:
    """Open adapters in PEFT's layout, with the model that they belong to."""
    adapter = open_adapter(directory)
    name = moved_to or adapter.base
    if not name:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} does not name the model that the adapters belong to. Say where it is by"
            " --base=DIR, or set base_model_name_or_path in that file."
        )
    try:
        base = _open_whole(name)
    except UserError as error:
        correct = f"base_model_name_or_path in {directory / ADAPTER_CONFIG}"
        raise UserError(_no_base(directory, name[:200], error, correct)) from None
    check_adapter(adapter, base.shapes, base.family)
    config, tokenizer, files = default_config(), base.tokenizer, base.tokenizer_directory
    if (directory / "tokenizer.json").is_file():  # else only the base has one
        tokenizer, files = load_pretrained(str(directory)), str(directory)
    check_vocabulary(tokenizer, base.shapes, directory)
    config.model, config.init_from = base.config.model, name
    config.tokenizer.update({"kind": "hf", "pretrained": files})
    return Source(
        directory=directory,
        config=config,
        shapes=base.shapes,
        tokenizer=tokenizer,
        stop_ids=tuple(dict.fromkeys((*base.stop_ids, tokenizer.eot_id))),
        fingerprint=hashlib.sha256(
            f"{base.fingerprint} {_fingerprint(directory, ADAPTER_CONFIG)}".encode()
        ).hexdigest(),
        base=base,
        peft=adapter,
    )


def _open_whole(name: str) -> Source:
    """Open a run or a model of others, but no adapters in PEFT's layout, which may name each other in a circle."""
    directory = local_directory(name)
    if directory is None or not is_run(directory):
        directory = locate(name)
        if is_adapter(directory):
            raise UserError(f"{directory} holds adapters of PEFT. Needed: a whole model.")
    return open_source(str(directory))


def _same_files(directory: Path, found: str, expected: str) -> None:
    if expected and found != expected:
        raise UserError(
            f"{directory} holds another model than the one that this run began from: its files differ. Only that"
            " one will do. Name the directory where it is."
        )


def source_of(pretrained: Pretrained) -> Source:
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
        fingerprint=_fingerprint(pretrained.directory, "config.json"),
        pretrained=pretrained,
    )


def _fingerprint(directory: Path, config: str) -> str:
    """Digest the file `config`, and of each safetensors file its name, its size, its first and its last MiB."""
    digest = hashlib.sha256((directory / config).read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()


def load_params(source: Source, matrices: Any, place: PlaceParam) -> Any:
    """Load the parameters through `place`: matrices in the dtype `matrices`, vectors in fp32, adapters merged."""
    if source.pretrained is not None:
        return source.pretrained.load_params(matrices, place)
    if source.base is None:
        assert source.step is not None
        checkpoints = source.directory / "checkpoints"
        abstract = abstract_stored(source.shapes, matrices)
        return restore_params(checkpoints, source.step, abstract, lambda path, x: place(path, _in_range(path, x)))
    adapters, lora = load_adapters(source)
    return load_params(
        source.base, matrices, lambda path, x: place(path, _in_range(path, merge(path, x, adapters, lora)))
    )


def load_adapters(source: Source) -> tuple[Any, LoRA]:
    """Load adapters alone, fp32, on the host, and their settings."""
    if source.peft is not None:
        assert source.base is not None
        return load_adapter(source.peft, source.base.shapes, source.base.family), source.peft.lora
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
