"""Damage to a run, of every kind: each command gives the same verdict on it, and the rotation keeps its size.

The commands that load a run share two ways in: `open_source` and `load_params` (generate, chat, evaluate, export,
init_from), and `look_for_run` and `Checkpoints.restore` (train). On Kaggle `restore_earlier_run` comes before the
second one. They are called here as the commands call them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jgpt.data.tokenizer import load_tokenizer, train_char
from jgpt.errors import UserError
from jgpt.kaggle.session.resume import restore_earlier_run
from jgpt.loading.export import export_run
from jgpt.loading.source import load_params, open_source
from jgpt.model.shapes import model_config
from jgpt.parallel.build import Parts, make_parts
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.identity import look_for_run, read_config
from jgpt.run_dir.manifest import digest, read_meta, steps_without_manifest, verify, whole_steps

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def parts(trained: Path) -> Parts:
    """Return the parts of the trained run; nothing of it is compiled or allocated."""
    config = read_config(trained)
    vocab_size = load_tokenizer(trained / "tokenizer").vocab_size
    return make_parts(config, model_config(config.model, vocab_size), jax.local_devices())


def _checkpoints(run: Path, step: int = 4) -> Path:
    return run / "checkpoints" / str(step)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)


def _flip_largest(run: Path) -> None:
    _flip(max(_checkpoints(run).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0))


def _manifest(run: Path) -> Path:
    manifest = run / "checkpoints" / "4.sha256"
    manifest.unlink()
    return manifest


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _swap_two_ids(run: Path) -> None:
    path = run / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    path.write_text(json.dumps(content))


def _another_size(run: Path) -> None:
    train_char(map(chr, range(32, 256))).save(run / "tokenizer", 16)


def _of_an_older_version(run: Path) -> None:
    """Checkpoints that do not say which tokenizer they were trained with."""
    for step in (2, 4):
        path = _checkpoints(run, step) / "meta" / "metadata"
        meta = json.loads(path.read_text())
        del meta["tokenizer_sha256"]
        path.write_text(json.dumps(meta))
        (run / "checkpoints" / f"{step}.sha256").write_text(digest(_checkpoints(run, step)))


# What is done to a run with the checkpoints 2 and 4; the step that train goes on from, that the other commands load,
# and that is brought back on Kaggle; 0: refused with a message, or nothing brought back.
TABLE: dict[str, tuple[Damage, int, int, int]] = {
    "none": (lambda run: None, 4, 4, 4),
    "a bit of the parameters": (_flip_largest, 2, 0, 2),
    "no parameters": (lambda run: shutil.rmtree(_checkpoints(run) / "params"), 2, 0, 2),
    "no optimizer state": (lambda run: shutil.rmtree(_checkpoints(run) / "training"), 2, 0, 2),
    "no meta": (lambda run: shutil.rmtree(_checkpoints(run) / "meta"), 2, 0, 2),
    "meta cut off": (lambda run: _truncate(_checkpoints(run) / "meta" / "metadata"), 2, 0, 2),
    "meta is null": (lambda run: (_checkpoints(run) / "meta" / "metadata").write_text("null"), 2, 0, 2),
    "meta of an older step is null": (
        lambda run: (_checkpoints(run, 2) / "meta" / "metadata").write_text("null"), 4, 4, 4
    ),
    "manifest is empty": (lambda run: _manifest(run).write_text(""), 2, 0, 2),
    "manifest is no text": (lambda run: _flip(run / "checkpoints" / "4.sha256"), 2, 0, 2),
    "manifest is gone": (_manifest, 2, 2, 2),
    "manifest is a directory": (lambda run: _manifest(run).mkdir(), 2, 2, 2),
    "manifest is a dangling link": (lambda run: _manifest(run).symlink_to("nowhere"), 2, 2, 2),
    "all manifests are gone": (lambda run: [path.unlink() for path in run.glob("checkpoints/*.sha256")], 0, 0, 0),
    "the tokenizer has two ids swapped": (_swap_two_ids, 0, 0, 0),
    "the tokenizer has another size": (_another_size, 0, 0, 0),
    "checkpoints of an older version": (_of_an_older_version, 4, 4, 4),
    "of an older version, the tokenizer of another size": (
        lambda run: (_of_an_older_version(run), _another_size(run)), -1, 0, 4
    ),
}  # fmt: skip


def _train(run: Path, parts: Parts) -> tuple[Checkpoints | None, Any]:
    """Return what training would go on from, as `start.py` finds it."""
    config = read_config(run)
    config.out_dir = str(run)
    assert look_for_run(run, config)
    vocab_size = load_tokenizer(run / "tokenizer").vocab_size
    parts = make_parts(config, model_config(config.model, vocab_size), parts.strategy.devices)
    checkpoints, abstract = Checkpoints(run, keep_last=2, keep_best=True), jax.eval_shape(parts.init)
    try:
        return checkpoints, checkpoints.restore(abstract, parts.strategy.shardings(abstract))
    except UserError:
        checkpoints.close()
        raise


@pytest.mark.parametrize("fault", TABLE)
def test_each_command_gives_the_same_verdict(
    trained: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    damage, trains, loads, resumes = TABLE[fault]
    run = tmp_path / "kaggle" / "input" / "my-run" / "outputs"
    shutil.copytree(trained, run)
    damage(run)
    before = digest(run)

    # generate, chat, evaluate, export, init_from
    if loads:
        source = open_source(str(run))
        params = load_params(source, np.float32, lambda path, array: array)
        assert source.step == loads and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        export_run(str(run), tmp_path / "exported", step=None, base="", dtype="auto")
    else:
        with pytest.raises(UserError) as refused:
            load_params(open_source(str(run)), np.float32, lambda path, array: array)
        with pytest.raises(UserError):
            export_run(str(run), tmp_path / "exported", step=None, base="", dtype="auto")
        assert not (tmp_path / "exported").exists()
        if trains > 0:  # never another step in silence: the message names it
            assert "checkpoint 4" in str(refused.value) and "--step: [2]" in str(refused.value)
            load_params(open_source(str(run), step=2), np.float32, lambda path, array: array)

    # train on Kaggle, where this run is an input
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    config = read_config(trained)
    config.out_dir = str(tmp_path / "kaggle" / "working" / "outputs")
    restore_earlier_run(config)
    found = whole_steps(Path(config.out_dir) / "checkpoints")
    assert (found or [0])[-1] == resumes and [verify(Path(config.out_dir) / "checkpoints", s) for s in found] == [
        ""
    ] * len(found)
    assert digest(run) == before  # nothing so far has changed the run

    # train
    if trains < 0:  # refused as well, and Orbax leaves coroutines behind that nobody awaits, which later tests see
        return
    if not trains:
        with pytest.raises(UserError):
            _train(run, parts)
        assert {line for line in before.splitlines() if "/checkpoints/" in line} <= set(digest(run).splitlines())
        return
    checkpoints, restored = _train(run, parts)
    assert checkpoints is not None and restored is not None
    state, meta = restored
    assert meta["step"] == trains == int(state.step)
    assert {line for line in before.splitlines() if "/checkpoints/" in line} <= set(digest(run).splitlines())

    # The rotation: the damaged ones make room, nothing else does, and what is kept is whole.
    checkpoints.save(state._replace(step=np.int32(6)), meta | {"step": 6, "val_loss": None})
    checkpoints.close()
    directory, kept = run / "checkpoints", whole_steps(run / "checkpoints")
    assert kept[-2:] == [trains, 6] and len(kept) <= 3 and not steps_without_manifest(directory)
    assert [verify(directory, step) for step in kept] == [""] * len(kept)
    assert {path.name for path in directory.iterdir()} == {*map(str, kept), *(f"{step}.sha256" for step in kept)}
    assert read_meta(directory, 6)["step"] == 6
