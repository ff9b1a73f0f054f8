"""Checkpoints: what is saved comes back bit for bit, and what is damaged is found, named and passed over."""

import gc
import hashlib
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from jgpt.errors import UserError
from jgpt.run_dir import checkpoint as module
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.manifest import digest, read_meta, steps_without_manifest, verify, whole_steps
from jgpt.run_dir.params import restore_params, save_params
from jgpt.step.state import LossScale, TrainState, tree_bytes

Opened = Callable[..., Checkpoints]


def state_at(step: int) -> TrainState:
    """Make a small state that has everything a real one has, other numbers in it at each step."""
    random = np.random.default_rng(step)
    params = {
        "wte": {"embedding": random.normal(size=(40, 8)).astype(np.float32)},
        "h_0": {"norm": {"scale": random.normal(size=8).astype(jnp.bfloat16)}},
    }
    opt_state = optax.adamw(optax.constant_schedule(0.1)).init(params)
    opt_state = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), opt_state)
    opt_state[0].mu["wte"]["embedding"][0, :3] = np.nan, -0.0, 1e-42  # kept as they are
    count = np.int32(step)
    return TrainState(count, count, params, opt_state, LossScale(np.float32(2.0**step), count, count, count))


ABSTRACT = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state_at(1)))


def on(device: jax.Device) -> Any:
    """Return shardings: the whole state on one device."""
    return jax.tree.map(lambda _: SingleDeviceSharding(device), ABSTRACT)


def meta_at(step: int, val_loss: float | None = None) -> dict[str, Any]:
    return {"step": step, "val_loss": val_loss, "tokens": step * 100}


def bits(state: Any) -> list[tuple]:
    return [(np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Open the checkpoints of `tmp_path`; at the end they are closed."""
    every = []

    def open_checkpoints(keep_last: int = 2, keep_best: bool = False) -> Checkpoints:
        every.append(Checkpoints(tmp_path, keep_last, keep_best))
        return every[-1]

    yield open_checkpoints
    for checkpoints in every:
        checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save steps 3 and 5 once; tests copy the directory."""
    run_dir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(run_dir, 2, False)
    for step in (3, 5):
        checkpoints.save(state_at(step), meta_at(step))
    checkpoints.close()
    return run_dir / "checkpoints"


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored_step(checkpoints: Checkpoints) -> int:
    restored = checkpoints.restore(ABSTRACT, on(jax.local_devices()[0]))
    assert restored is not None
    state, meta = restored
    assert meta == meta_at(meta["step"]) and bits(state) == bits(state_at(meta["step"]))
    return meta["step"]


def test_whole_state_comes_back_bitwise(copied: Path, opened: Opened):
    checkpoints = opened()
    assert checkpoints.steps() == [3, 5] and restored_step(checkpoints) == 5
    second = jax.local_devices()[1]
    restored = checkpoints.restore(ABSTRACT, on(second))
    assert restored is not None
    state, _ = restored
    assert jax.tree.structure(state) == jax.tree.structure(ABSTRACT)
    assert all(leaf.devices() == {second} for leaf in jax.tree.leaves(state))


def test_empty_directory_has_none(opened: Opened):
    checkpoints = opened()
    assert checkpoints.steps() == [] and checkpoints.restore(ABSTRACT, on(jax.local_devices()[0])) is None


def test_keeps_the_last_ones(tmp_path: Path, opened: Opened):
    checkpoints = opened(keep_last=2)
    for step in range(1, 5):
        checkpoints.save(state_at(step), meta_at(step, 1.0 * step))
        checkpoints.wait()
        assert checkpoints.steps() == [max(1, step - 1), step][-min(step, 2) :]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "4", "3.sha256", "4.sha256"}
    assert checkpoints.save_seconds > 0


def test_keeps_the_best_one(opened: Opened):
    checkpoints = opened(keep_last=1, keep_best=True)
    kept = []
    for step, loss in enumerate([None, 3.0, 2.0, None, float("nan"), 2.5, 1.0, 1.5], 1):
        checkpoints.save(state_at(step), meta_at(step, loss))
        checkpoints.wait()
        kept.append(checkpoints.steps())
    assert kept == [[1], [2], [3], [3, 4], [3, 5], [3, 6], [7], [7, 8]]


def test_keep_best_outlives_a_new_process(tmp_path: Path, opened: Opened):
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        checkpoints = opened(keep_last=1, keep_best=True)
        checkpoints.save(state_at(step), meta_at(step, loss))
        checkpoints.close()
    assert whole_steps(tmp_path / "checkpoints") == [1, 3]


def test_manifest_is_what_sha256sum_reads(copied: Path):
    lines = (copied / "5.sha256").read_text().splitlines()
    files = sorted(path for path in (copied / "5").rglob("*") if path.is_file())
    expected = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(copied)}" for path in files]
    assert lines == expected and digest(copied / "5").splitlines() == expected
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "5.sha256"], cwd=copied, check=True)


def test_flipped_truncated_deleted_and_added_files_are_named(copied: Path):
    """Every file of a step, each way."""
    files = sorted(path for path in (copied / "5").rglob("*") if path.is_file())
    assert len(files) > 5 and verify(copied, 5) == ""
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        if content:
            flipped[len(content) // 2] ^= 1
        for damaged in (bytes(flipped) if content else b"x", content[:-1] if content else None, None, content + b"\0"):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            assert verify(copied, 5) == f"1 of its files changed or missing, such as {path.relative_to(copied)}"
            path.write_bytes(content)
    (copied / "5" / "new").write_text("")
    assert verify(copied, 5) == "1 of its files changed or missing, such as 5/new"
    assert verify(copied, 3) == ""


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "directory", "empty manifest"])
def test_falls_back_to_the_step_before(copied: Path, opened: Opened, damage: str, caplog: pytest.LogCaptureFixture):
    largest = max((path for path in (copied / "5").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    match damage:
        case "flip":
            largest.write_bytes(content[:-9] + bytes([content[-9] ^ 128]) + content[-8:])
        case "truncate":
            largest.write_bytes(content[: len(content) // 2])
        case "delete":
            largest.unlink()
        case "manifest":
            (copied / "5.sha256").unlink()
        case "directory":
            shutil.rmtree(copied / "5")
        case "empty manifest":
            (copied / "5.sha256").write_text("")
    with caplog.at_level(logging.WARNING, "jgpt"):
        checkpoints = opened(keep_last=1)
        assert restored_step(checkpoints) == 3
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(told) == (0 if damage == "directory" else 1)
    expected = "checkpoint 5 has no manifest" if damage == "manifest" else "checkpoint 5 is damaged"
    assert all(expected in line for line in told)
    # What is saved from there on takes the place of the bad one, and is never thrown away for its sake.
    checkpoints.save(state_at(4), meta_at(4))
    checkpoints.wait()
    assert checkpoints.steps() == [4] and restored_step(checkpoints) == 4
    checkpoints.save(state_at(5), meta_at(5))
    checkpoints.wait()
    assert checkpoints.steps() == [5] and restored_step(checkpoints) == 5 and verify(copied, 5) == ""
    assert {path.name for path in copied.iterdir()} == {"5", "5.sha256"}


def test_a_damaged_step_is_saved_over(copied: Path, opened: Opened):
    (copied / "5" / "_CHECKPOINT_METADATA").unlink()
    checkpoints = opened()
    assert restored_step(checkpoints) == 3
    checkpoints.save(state_at(5), meta_at(5))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5] and restored_step(checkpoints) == 5


def test_damage_to_an_old_step_does_not_stop_the_run(copied: Path, opened: Opened):
    """Its score cannot be read; a save afterwards is not to blame."""
    shutil.rmtree(copied / "3" / "meta")
    checkpoints = opened(keep_last=2, keep_best=True)
    checkpoints.save(state_at(6), meta_at(6, 1.0))
    checkpoints.wait()
    assert checkpoints.steps() == [5, 6]


def test_none_whole_is_refused_and_nothing_changed(copied: Path, opened: Opened):
    for step in (3, 5):
        (copied / str(step) / "params" / "_METADATA").write_text("{}")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds checkpoints, and none is whole. Nothing was changed"):
        opened().restore(ABSTRACT, on(jax.local_devices()[0]))
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", [5, 9])
def test_a_step_without_manifest_is_not_whole(copied: Path, opened: Opened, left: int):
    """A kill between Orbax's commit and ours: never restored, and gone after the next save, whichever step that is."""
    (copied / "5.sha256").unlink()
    (copied / "5").rename(copied / str(left))
    checkpoints = opened()
    assert checkpoints.steps() == [3] and restored_step(checkpoints) == 3
    checkpoints.save(state_at(5), meta_at(5))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5] and restored_step(checkpoints) == 5 and verify(copied, 5) == ""
    assert not (copied / "9").exists()


def test_half_written_directories_are_cleared(copied: Path, opened: Opened):
    """A kill in the middle of Orbax's own writing."""
    half = copied / "7.orbax-checkpoint-tmp-0"
    shutil.copytree(copied / "5", half)
    checkpoints = opened()
    assert restored_step(checkpoints) == 5
    checkpoints.save(state_at(7), meta_at(7))
    checkpoints.wait()
    assert checkpoints.steps() == [5, 7] and not half.exists()


def test_saving_a_saved_step_again_does_nothing(copied: Path, opened: Opened):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copied.rglob("*")}
    checkpoints = opened()
    checkpoints.save(state_at(5)._replace(params={}), meta_at(5))
    checkpoints.wait()
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copied.rglob("*")} == before


def test_saving_in_a_row_waits_its_turn(opened: Opened):
    checkpoints = opened(keep_last=3)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), meta_at(step))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3] and restored_step(checkpoints) == 3


@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_failed_write_is_told_once_and_costs_nothing(
    copied: Path, opened: Opened, where: str, monkeypatch: pytest.MonkeyPatch
):
    """A full disk, before the background begins or in it."""
    checkpoints = opened()

    def fail(*arguments: Any, **options: Any) -> None:
        (copied / "8.orbax-checkpoint-tmp-1").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: Error writing file: No space left on device\nand more lines")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoints._manager, where, fail)
        with pytest.raises(
            UserError, match=r"could not be written .*GB free.*No space left on device\. Earlier.*whole"
        ):
            checkpoints.save(state_at(8), meta_at(8))
            checkpoints.wait()
    checkpoints.wait()  # told once
    assert not list(copied.glob("*tmp*")) and restored_step(checkpoints) == 5
    checkpoints._manager.wait_until_finished()
    checkpoints.save(state_at(8), meta_at(8))
    checkpoints.wait()
    assert checkpoints.steps() == [5, 8] and restored_step(checkpoints) == 8


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Let this process write no longer files, as a full disk would not: real writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore's late callbacks
def test_a_write_that_really_fails_costs_nothing(copied: Path, opened: Opened, caplog: pytest.LogCaptureFixture):
    """Said once, also where Orbax says it again when it is closed; nothing half-written stays when it is opened again.

    Before that a thread of the failed save may write a last file under its temporary name.
    """

    def finished() -> list[str]:
        return [line for line in digest(copied).splitlines() if "orbax-checkpoint-tmp" not in line]

    checkpoints = opened()
    before = finished()
    with files_of_at_most(500), pytest.raises(UserError, match="could not be written .*Earlier checkpoints are whole"):
        checkpoints.save(state_at(8), meta_at(8))
        checkpoints.wait()
    checkpoints.close()
    assert finished() == before
    with files_of_at_most(500), pytest.raises(UserError, match="could not be written .*Make room"):
        save_params(copied, 9, state_at(9).params, meta_at(9))
    assert finished() == before and not caplog.messages
    again = opened()
    assert again.steps() == [3, 5] and not list(copied.glob("*tmp*")) and restored_step(again) == 5
    gc.collect()  # errors that nobody asks for any more are reported here, and not in the next test


def test_steps_that_nobody_judged_are_never_deleted(copied: Path, opened: Opened):
    """More than one without a manifest: somebody removed those. A directory in a manifest's place is in the way."""
    for step in (3, 5):
        (copied / f"{step}.sha256").unlink()
    (copied / "8.sha256").mkdir()
    checkpoints = opened(keep_last=1)
    for step in (7, 8):
        checkpoints.save(state_at(step), meta_at(step))
    checkpoints.wait()
    assert {path.name for path in copied.iterdir()} == {"3", "5", "8", "8.sha256"} and checkpoints.steps() == [8]


def test_a_kill_while_a_step_is_deleted_leaves_no_half_of_it(copied: Path, opened: Opened):
    """It is renamed first; the next process removes the rest."""
    checkpoints = opened(keep_last=1)
    with mock.patch.object(shutil, "rmtree", side_effect=SystemExit), pytest.raises(SystemExit):
        checkpoints._delete(3)
    assert checkpoints.steps() == [5] and not steps_without_manifest(copied)
    assert restored_step(opened()) == 5 and {path.name for path in copied.iterdir()} == {"3.sha256", "5", "5.sha256"}


def test_a_lost_directory_is_told(tmp_path: Path, opened: Opened):
    """Really: Orbax cannot write where a file has taken the directory's place."""
    checkpoints = opened()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        checkpoints.save(state_at(1), meta_at(1))
        checkpoints.wait()


@pytest.mark.parametrize(("error", "told"), [(TimeoutError, UserError), (MemoryError, MemoryError)])
def test_an_error_without_words_is_told_by_its_name(opened: Opened, monkeypatch: pytest.MonkeyPatch, error, told):
    """And one that is no disk's stays itself."""
    checkpoints = opened()
    monkeypatch.setattr(module, "write_file", lambda *arguments: (_ for _ in ()).throw(error()))
    checkpoints.save(state_at(1), meta_at(1))
    with pytest.raises(told, match="TimeoutError" if told is UserError else None):
        checkpoints.wait()


def test_the_next_save_tells_of_the_failed_one(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    checkpoints = opened()
    with monkeypatch.context() as broken:
        broken.setattr(module, "write_file", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left")))
        checkpoints.save(state_at(1), meta_at(1))
        with pytest.raises(UserError, match="No space left"):
            checkpoints.save(state_at(2), meta_at(2))
    checkpoints.save(state_at(3), meta_at(3))
    checkpoints.wait()
    assert checkpoints.steps() == [3] and restored_step(checkpoints) == 3


def test_a_save_that_failed_does_not_hide_why_the_run_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(KeyError, match="first"), Checkpoints(tmp_path, 1, False) as checkpoints:
        checkpoints._error = OSError(28, "No space left on device")
        raise KeyError("first")
    assert "No space left on device" in caplog.text
    with pytest.raises(UserError, match="No space left"), Checkpoints(tmp_path, 1, False) as checkpoints:
        checkpoints._error = OSError(28, "No space left on device")


def test_parameters_alone(copied: Path):
    paths = []
    params = restore_params(copied, 3, ABSTRACT.params, lambda path, x: paths.append(path) or x)
    assert bits(params) == bits(state_at(3).params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    found = jax.tree_util.tree_leaves_with_path(params)
    assert sorted(paths) == sorted(tuple(key.key for key in path) for path, _ in found)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float16), ABSTRACT.params)
    as_half = restore_params(copied, 3, half, lambda path, x: x)
    assert bits(as_half) == bits(jax.tree.map(lambda x: x.astype(np.float16), params))
    assert read_meta(copied, 3) == meta_at(3)
    (copied / "3" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoint 3 in .* is damaged: .*_CHECKPOINT_METADATA\. .*--step.*5"):
        restore_params(copied, 3, ABSTRACT.params, lambda path, x: x)


def test_whole_steps_are_sorted_as_numbers(tmp_path: Path):
    for name in ("9", "10", "100", "x", "7"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.sha256").write_text("")
    (tmp_path / "8.sha256").write_text("")
    (tmp_path / "11").mkdir()
    assert whole_steps(tmp_path) == [7, 9, 10, 100]
    assert whole_steps(tmp_path / "nowhere") == []


def test_state_bytes_is_what_the_disk_holds(tmp_path: Path):
    """Within a tenth, once the arrays outweigh Orbax's own notes. Random numbers: zeros would compress."""
    random = np.random.default_rng(0)
    big = state_at(1)._replace(params={"kernel": random.normal(size=(1000, 500)).astype(np.float32)})
    checkpoints = Checkpoints(tmp_path, 1, False)
    checkpoints.save(big, meta_at(1))
    checkpoints.close()
    on_disk = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    expected = tree_bytes(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, big)))
    assert abs(on_disk / expected - 1) < 0.1 and os.path.isdir(tmp_path / "checkpoints" / "1")
