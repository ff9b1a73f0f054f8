"""The disk budget of a run directory: planned against before the first step, and never exceeded after it."""

import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from test_checkpoint import ABSTRACT, meta_at, state_at

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.run_dir import disk
from jgpt.run_dir.checkpoint import SAVE_BYTES_PER_SECOND, Checkpoints
from jgpt.run_dir.disk import SMALL_FILES, bytes_below, check_room, room
from jgpt.step.state import tree_bytes
from jgpt.training.setup import check_disk

MB = 1_000_000


def large(step: int, n_bytes: int = 8 * MB) -> Any:
    """Make a state of so many bytes, which no compression makes smaller."""
    state = state_at(step)
    table = np.random.default_rng(step).integers(0, 2**32, n_bytes // 4, np.uint32)
    return state._replace(params=state.params | {"large": table})


def restored(checkpoints: Checkpoints, abstract: Any) -> Any:
    return checkpoints.restore(abstract, jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract))


def test_room_is_what_is_free_or_what_the_budget_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 500 * MB))
    assert room(tmp_path, 0.0) == room(tmp_path, 1.0) == 500 * MB
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"x" * MB)
    assert bytes_below(tmp_path) == MB
    assert room(tmp_path, 0.1) == 100 * MB - SMALL_FILES - MB
    check_room(tmp_path, 79 * MB, 0.1)
    with pytest.raises(UserError, match=r"0.08 GB would take .* 0.00 GB already, above its checkpoint.disk_gb=0.1"):
        check_room(tmp_path, 80 * MB, 0.1)


def test_the_plan_counts_the_budget_and_other_files(tmp_path: Path):
    options = default_config().checkpoint
    size = tree_bytes(large(1))
    options.disk_gb = (4 * size + SMALL_FILES + 1000) / 1e9  # keep_last 2, the best one, and one being written
    check_disk(tmp_path, size, options)
    (tmp_path / "tokens.bin").write_bytes(b"x" * 2 * MB)
    with pytest.raises(UserError, match=r"4 of 0.01 GB .* 0.03 GB are left .* files take 0.00 GB. Set .*keep_last=1"):
        check_disk(tmp_path, size, options)
    options.keep_best = False
    check_disk(tmp_path, size, options)


def test_the_run_directory_never_exceeds_its_budget(tmp_path: Path):
    """Three whole ones are wanted and there is room for two and a half: old ones go first, the newest never."""
    budget = (SMALL_FILES + 20 * MB) / 1e9
    checkpoints = Checkpoints(tmp_path, 3, False, budget)
    most, seen, done = 0, list[list[int]](), threading.Event()

    def watch() -> None:
        nonlocal most
        last = False
        while not last:
            last = done.is_set()  # and looks once more, or a busy machine may show it nothing
            most = max(most, bytes_below(tmp_path))
            seen.append(checkpoints.steps())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for step in range(1, 7):
        checkpoints.save(large(step), meta_at(step))
    checkpoints.close()
    done.set()
    watcher.join()
    assert checkpoints.steps() == [5, 6]
    assert 16 * MB < most <= budget * 1e9
    began = next(i for i, steps in enumerate(seen) if steps)
    assert all(seen[began:])  # from the first whole one on there always is one


def test_the_best_one_is_given_up_last(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, 3, True, (SMALL_FILES + 28 * MB) / 1e9)
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0), (4, 2.5)):
        checkpoints.save(large(step), meta_at(step, loss))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3, 4]
    checkpoints.disk_gb = (SMALL_FILES + 20 * MB) / 1e9
    checkpoints.save(large(5), meta_at(5, 9.0))
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]
    checkpoints.close()


def test_a_save_without_room_is_refused_and_the_newest_stays(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, 2, False, (SMALL_FILES + 12 * MB) / 1e9)
    checkpoints.save(large(1), meta_at(1))
    with pytest.raises(UserError, match="above its checkpoint.disk_gb=.*Earlier checkpoints are whole"):
        checkpoints.save(large(2), meta_at(2))
    assert checkpoints.steps() == [1] and restored(checkpoints, jax.eval_shape(lambda: large(1)))
    checkpoints.close()


def test_a_full_disk_makes_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a budget: what is free decides, and old ones go before the save and not after it."""
    checkpoints = Checkpoints(tmp_path, 3, False)
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), meta_at(step))
    checkpoints.wait()
    free = iter([0, 10**9, 10**9, 10**9])
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(next(free)))
    checkpoints.save(state_at(4), meta_at(4))
    assert 1 not in checkpoints.steps()
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3, 4]
    checkpoints.close()


def test_a_save_is_guessed_from_its_bytes_until_one_was_timed(tmp_path: Path):
    calls = []
    checkpoints = Checkpoints(tmp_path, 1, False, on_saved=lambda run_dir, step: calls.append((run_dir, step)))
    assert checkpoints.expected_seconds(10**9) == 10**9 / SAVE_BYTES_PER_SECOND == 20
    checkpoints.save(state_at(1), meta_at(1))
    checkpoints.wait()
    assert calls == [(tmp_path, 1)]
    first = checkpoints.save_seconds
    assert 0 < first == checkpoints.expected_seconds(10**9)
    checkpoints.save_seconds = 100.0  # a slower one before
    checkpoints.save(state_at(2), meta_at(2))
    checkpoints.wait()
    assert checkpoints.expected_seconds(1) == 100.0 and calls[-1] == (tmp_path, 2)
    checkpoints.save(state_at(2), meta_at(2))  # it is there: nothing is written, and nobody called
    checkpoints.close()
    assert len(calls) == 2 and tree_bytes(ABSTRACT) > 0
