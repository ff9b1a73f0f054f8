"""Runs that need more memory than any machine here has: what they say, and what they leave."""

import functools
import gc
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.data.write_tokens import prepare
from jgpt.errors import OutOfMemory
from jgpt.parallel.devices import training_devices
from jgpt.parallel.replicate import Replicate
from jgpt.planning.remedies import EVALUATING, PLACING, TRAINING, device_remedies
from jgpt.run_dir.manifest import digest, whole_steps
from jgpt.training.hooks import sample
from jgpt.training.setup import set_up
from jgpt.training.start import train

# Attention scores of so many sequences of 1024, eight heads each, take 128 GiB on each of two devices.
TOO_MANY = {"batch.global_batch_size": 2**13, "execution.micro_batch_size": 2**12}
SMALL = {
    "tokenizer.kind": "char", "model.n_layers": 1, "model.n_heads": 8, "model.d_model": 16,
    "model.context_length": 1024, "optimizer.total_steps": 2, "optimizer.warmup_steps": 1,
    "batch.global_batch_size": 2, "execution.micro_batch_size": 1, "eval.every_steps": 100, "eval.batches": 1,
    "sample.num_samples": 0, "checkpoint.every_steps": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sets variables for the libraries below it: they are put back."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "NCCL_CUMEM_HOST_ENABLE", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def config_of(directory: Path, **changes: Any) -> ConfigDict:
    """Make a small run of 2 steps in a directory, with changes."""
    text = directory / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(3000)))
    made = default_config()
    made.update_from_flattened_dict(SMALL | {"out_dir": str(directory / "run"), "data.text_glob": str(text)} | changes)
    return made


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ConfigDict]:
    return functools.partial(config_of, tmp_path)


@pytest.fixture(scope="module")
def without_samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train, where the samples do not fit; return the directory and what was logged."""
    directory, lines = tmp_path_factory.mktemp("without_samples"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("jgpt").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate", lambda *_, **__: jax.block_until_ready(jax.numpy.zeros(1 << 44)))
        train(config_of(directory, **{"sample.num_samples": 8}))
    logging.getLogger("jgpt").removeHandler(handler)
    return directory, "\n".join(lines)


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run" / "status.json").read_text())


def test_a_step_that_does_not_fit(config: Callable[..., ConfigDict], without_samples: tuple[Path, str], tmp_path: Path):
    """Explained without JAX's traceback; the checkpoint stays, no array does, and the same process can go on."""
    shutil.copytree(without_samples[0] / "run", tmp_path / "run")
    before, arrays = digest(tmp_path / "run" / "checkpoints" / "2"), len(jax.live_arrays())
    with pytest.raises(OutOfMemory) as caught:
        train(config(**TOO_MANY, **{"optimizer.total_steps": 3}), "python -m jgpt.train --config=x.py --config.seed=1")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("out of memory in training: the cpu was asked for ") and " GiB are free. Take " in first
    assert first.endswith("--config.execution.micro_batch_size=2048 (it was 4096; the global batch stays as it is).")
    assert rest[0].startswith("  or --config.execution.remat=block (")
    assert "  python -m jgpt.plan --config=x.py --config.seed=1 --tune" in rest
    gc.collect()
    assert caught.value.__context__ is None and len(jax.live_arrays()) <= arrays
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["reason"] == f"OutOfMemory: {first}"
    assert status(tmp_path)["resume_command"] == "python -m jgpt.train --config=x.py --config.seed=1"
    assert digest(tmp_path / "run" / "checkpoints" / "2") == before
    train(config(**{"optimizer.total_steps": 3}))
    assert status(tmp_path)["state"] == "finished" and whole_steps(tmp_path / "run" / "checkpoints") == [2, 3]


def test_an_evaluation_that_does_not_fit_is_found_before_the_first_step(config: Callable[..., ConfigDict]):
    with pytest.raises(OutOfMemory, match=r"(?s)in evaluation: .*micro_batch_size=2048 .*loss_chunk_tokens=1024"):
        train(config(**TOO_MANY))


@pytest.mark.parametrize("chunk", [0, 64])
def test_evaluation_takes_no_more_than_the_step(config: Callable[..., ConfigDict], chunk: int):
    """So that a run whose first step fits cannot fail in a later evaluation; by XLA's own count."""
    c = config(**{"model.context_length": 64, "batch.global_batch_size": 8, "execution.micro_batch_size": 4})
    c.execution.update({"remat": "block", "loss_chunk_tokens": chunk})
    training = set_up(c, prepare(c, None), training_devices(c)).parts
    state = jax.eval_shape(training.init)
    tokens = jax.ShapeDtypeStruct((training.strategy.shares, 1, training.rows, 65), "int32")
    weights = jax.ShapeDtypeStruct((training.strategy.shares, training.rows, 64), "float32")
    row = jax.ShapeDtypeStruct((training.strategy.shares, training.rows, 65), "int32")
    step: Any = training.train_step
    evaluation: Any = training.eval_step
    programs = step.lower(state, {}, Batch(tokens)), evaluation.lower(state.params, {}, Batch(row, weights))
    of_the_step, of_evaluation = (p.compile().memory_analysis().temp_size_in_bytes for p in programs)
    assert 0 < of_evaluation < of_the_step


def test_samples_that_do_not_fit_do_not_end_the_run(without_samples: tuple[Path, str]):
    directory, logged = without_samples
    assert "no samples at step 2: out of memory in sampling: the cpu was asked for 65536.00 GiB" in logged
    assert "Take --config.sample.num_samples=4 (it was 8; 0: no samples)" in logged
    assert status(directory)["state"] == "finished" and whole_steps(directory / "run" / "checkpoints") == [2]


def test_the_machines_own_memory(config: Callable[..., ConfigDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The copy that a save makes does not fit."""

    def full(self: Any, tree: Any) -> Any:
        if hasattr(tree, "opt_state"):
            raise MemoryError("Unable to allocate 1.50 GiB for an array with shape (402653184,) and data type float32")
        return jax.device_get(tree)

    monkeypatch.setattr(Replicate, "to_save", full)
    with pytest.raises(OutOfMemory, match=r"(?s)in saving: the machine was asked for 1.50 GiB .*each save copies"):
        train(config())
    assert status(tmp_path)["state"] == "failed" and whole_steps(tmp_path / "run" / "checkpoints") == []


def advice(doing: str, rows: int = 8, accumulation: int = 3, remat: str = "none", lora: Any = None, **keys: Any) -> str:
    config = default_config()
    config.update_from_flattened_dict(keys)
    training: Any = SimpleNamespace(
        rows=rows, accumulation=accumulation, sequence_length=1024, model=SimpleNamespace(remat=remat, lora=lora),
        strategy=SimpleNamespace(devices=[None] * 2),
    )  # fmt: skip
    return "\n".join(device_remedies(doing, config, training))


def test_overrides_are_those_that_change_something():
    assert advice(TRAINING).splitlines()[0].startswith("--config.execution.micro_batch_size=6 (it was 8")  # divides 24
    assert "micro_batch_size" not in advice(TRAINING, rows=1, accumulation=8)
    assert "remat=block" in advice(TRAINING, remat="dots")
    assert "remat" not in advice(TRAINING, remat="block") and "remat" not in advice(EVALUATING)
    assert "loss_chunk_tokens=512 " in advice(TRAINING, rows=1, accumulation=1, **{"execution.loss_chunk_tokens": 0})
    assert "loss_chunk_tokens" not in advice(TRAINING, **{"execution.loss_chunk_tokens": 256})
    assert "batch" not in advice(PLACING) and "smaller model" in advice(PLACING)
    assert "parallel=fsdp (each of 2 devices keeps" in advice(PLACING)
    split = advice(PLACING, **{"execution.parallel": "fsdp"})
    assert "parallel=fsdp" not in split and "gather=layer" in split and "first_moment" not in split
    assert "first_moment=bf16" in advice(PLACING, **{"execution.parallel": "fsdp", "execution.gather": "layer"})
    assert "lora.rank=8" in advice(PLACING, lora=object(), **{"lora.rank": 16})
