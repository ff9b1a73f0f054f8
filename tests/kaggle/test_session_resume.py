"""Resuming on Kaggle: the newest whole checkpoint, wherever the earlier output is mounted, and no other run's."""

import errno
import json
import shutil
import tarfile
from pathlib import Path
from unittest import mock

import pytest
from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.kaggle.session import pack as packing
from jgpt.kaggle.session.pack import pack
from jgpt.kaggle.session.resume import restore_earlier_run, unpack_model
from jgpt.run_dir.identity import read_config
from jgpt.run_dir.manifest import digest, read_meta, verify, whole_steps

MOUNTS = ("notebooks/me/my-run/outputs", "my-run/outputs", "datasets/me/my-run")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    return tmp_path / "kaggle"


@pytest.fixture
def config(trained, root) -> ConfigDict:
    """Return the config of the trained run, that is to go on in an empty working folder."""
    config = read_config(trained)
    config.out_dir = str(root / "working" / "outputs")
    return config


@pytest.fixture
def mount(trained, root):
    """Mount the trained run, and return the folder."""

    def make(place: str = MOUNTS[0], packed: bool = False) -> Path:
        folder = root / "input" / place
        shutil.copytree(trained, folder)
        if packed:
            pack(folder)
        return folder

    return make


def steps(config: ConfigDict) -> list[int]:
    """List the checkpoints in the run directory; all must be whole."""
    directory = Path(config.out_dir) / "checkpoints"
    assert [verify(directory, step) for step in whole_steps(directory)] == [""] * len(whole_steps(directory))
    return whole_steps(directory)


def flip_a_bit(folder: Path, step: int) -> None:
    """Damage a checkpoint, packed or not, as a bad disk does: its size stays."""
    path, at = folder / f"checkpoint-{step}.tar", 0
    if path.exists():
        with tarfile.open(path) as tar:
            largest = max(tar.getmembers(), key=lambda member: member.size)
        at = largest.offset_data + largest.size // 2
    else:
        path = max((folder / "checkpoints" / str(step)).rglob("*"), key=lambda path: path.stat().st_size)
        at = path.stat().st_size // 2
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", MOUNTS)
def test_a_run_is_brought_back_from_every_layout(config, mount, caplog, place, packed):
    caplog.set_level("INFO", "jgpt")
    folder = mount(place, packed)
    restore_earlier_run(config)
    assert steps(config)[-1] == 4
    assert f"continuing from checkpoint 4 of {folder}" in caplog.text
    out = Path(config.out_dir)
    for name in ("config.json", "metrics.jsonl", "samples.txt"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in (out / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert not list(out.glob(".staging*")) and not list(out.glob("checkpoints/.staging*"))


def test_nothing_is_brought_where_nothing_is_mounted_or_a_new_run_is_asked_for(config, mount):
    restore_earlier_run(config)
    assert not (Path(config.out_dir) / "config.json").exists()
    mount()
    config.checkpoint.resume = "never"
    restore_earlier_run(config)
    assert not (Path(config.out_dir) / "config.json").exists()


def test_what_is_in_the_run_directory_stays_where_it_is_as_new(config, mount, trained):
    shutil.copytree(trained, config.out_dir)
    mount()
    (Path(config.out_dir) / "samples.txt").write_text("mine")
    restore_earlier_run(config)
    assert (Path(config.out_dir) / "samples.txt").read_text() == "mine" and steps(config) == [2, 4]


def test_a_run_directory_that_was_packed_is_unpacked(config, trained):
    shutil.copytree(trained, config.out_dir)
    pack(Path(config.out_dir))
    restore_earlier_run(config)
    assert steps(config) == [2, 4] and not list(Path(config.out_dir).glob("*.tar"))


def test_a_newer_one_elsewhere_wins_over_the_run_directory(config, mount, trained):
    shutil.copytree(trained, config.out_dir)
    shutil.rmtree(Path(config.out_dir) / "checkpoints" / "4")
    (Path(config.out_dir) / "checkpoints" / "4.sha256").unlink()
    mount()
    restore_earlier_run(config)
    assert steps(config) == [2, 4]


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_newer_one_is_named_and_passed_over(config, mount, caplog, packed):
    damaged, whole = mount(MOUNTS[0], packed), mount(MOUNTS[1])
    flip_a_bit(damaged, 4)
    shutil.rmtree(whole / "checkpoints" / "4")
    restore_earlier_run(config)
    assert steps(config) == [2]
    assert f"checkpoint 4 of {damaged} is skipped: 1 of its files changed" in caplog.text
    assert not list(Path(config.out_dir).glob("checkpoints/.staging*"))


def test_a_damaged_one_in_the_run_directory_does_not_count(config, mount, trained, caplog):
    caplog.set_level("INFO", "jgpt")
    shutil.copytree(trained, config.out_dir)
    flip_a_bit(Path(config.out_dir), 4)
    shutil.rmtree(Path(config.out_dir) / "checkpoints" / "2")
    mount()
    restore_earlier_run(config)
    assert steps(config)[-1] == 4


@pytest.mark.parametrize("place", [0, 70])
def test_a_manifest_with_a_flipped_bit_is_no_manifest(config, mount, place):
    manifest = mount() / "checkpoints" / "4.sha256"
    content = bytearray(manifest.read_bytes())
    content[place] ^= 128  # no longer UTF-8
    manifest.write_bytes(content)
    restore_earlier_run(config)
    assert steps(config) == [2]


def test_a_full_disk_while_bringing_back_is_no_damage_of_what_is_brought(config, mount):
    mount(packed=True)
    with mock.patch("shutil.copyfileobj", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        with mock.patch("tarfile.copyfileobj", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            with pytest.raises(OSError, match="No space"):
                restore_earlier_run(config)
    restore_earlier_run(config)
    assert steps(config)[-1] == 4


def test_cut_off_tars_and_missing_tokenizers_are_passed_over(config, mount, caplog):
    torn, without, whole = mount(MOUNTS[0], True), mount(MOUNTS[1], True), mount(MOUNTS[2], True)
    (torn / "checkpoint-4.tar").write_bytes((torn / "checkpoint-4.tar").read_bytes()[:5000])
    (without / "tokenizer.tar").unlink()
    (whole / "checkpoint-4.tar").unlink()
    restore_earlier_run(config)
    assert steps(config) == [2] and "checkpoint-4.tar is damaged" in caplog.text


def test_another_run_is_passed_over_and_it_is_said_why(config, mount, caplog):
    caplog.set_level("INFO", "jgpt")
    folder = mount()
    config.model.n_layers = 2
    restore_earlier_run(config)
    assert not (Path(config.out_dir) / "config.json").exists()
    assert f"not resumed from: {folder} holds a run with another model" in caplog.text
    assert "model.n_layers: 1 -> 2" in caplog.text
    (folder / "config.json").write_text("{")
    restore_earlier_run(config)
    assert "is damaged, or of another version" in caplog.text


def test_a_fine_tuned_model_is_settled_by_what_it_began_from(config, mount):
    folder = mount()
    theirs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(theirs | {"init_from": "/somewhere/else"}))
    config.init_from = "/somewhere"
    config.model.n_layers = 6  # a default, which the model of init_from replaces
    restore_earlier_run(config)
    assert steps(config)[-1] == 4
    assert config.model.n_layers == 6  # the caller's config is not changed


def test_an_imported_model_is_nothing_to_go_on_from(config, mount, caplog):
    folder = mount()
    for step in ("2", "4"):
        shutil.rmtree(folder / "checkpoints" / step / "training")
        (folder / "checkpoints" / f"{step}.sha256").write_text(digest(folder / "checkpoints" / step))
    restore_earlier_run(config)
    assert steps(config) == [] and "it is an imported model" in caplog.text


def test_the_best_checkpoint_comes_along(config, mount):
    folder = mount(packed=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[2]["val_loss"] = 0.1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    restore_earlier_run(config)
    assert steps(config) == [2, 4]
    shutil.rmtree(config.out_dir)
    config.checkpoint.keep_best = False
    restore_earlier_run(config)
    assert steps(config) == [4]


def test_the_checkpoint_from_before_a_decay_comes_along(config, mount):
    folder = mount(packed=True)
    config.checkpoint.keep_best = False
    config.optimizer.update(schedule="wsd", decay_fraction=0.5)  # of 4 steps
    (folder / "config.json").write_text(config.to_json())
    restore_earlier_run(config)
    assert steps(config) == [2, 4]


class Killed(BaseException):
    """The end of a process, here."""


def test_killed_while_it_brings_a_run_back_it_begins_again(config, mount):
    mount(packed=True)
    moments = 0
    for target in ("replace", "unlink", "rmdir"):
        for n in range(100):
            shutil.rmtree(config.out_dir, ignore_errors=True)
            real, calls = getattr(Path, target), 0

            def change(path, *arguments, real=real, limit=n, **options):
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise Killed
                return real(path, *arguments, **options)

            try:
                with mock.patch.object(Path, target, change):
                    restore_earlier_run(config)
            except Killed:
                moments += 1
            else:
                break
            restore_earlier_run(config)
            assert steps(config)[-1] == 4
    assert moments > 8


def test_another_process_in_the_run_directory_is_not_disturbed(config, mount):
    from jgpt.run_dir.identity import open_run_dir

    mount()
    with open_run_dir(config.out_dir):
        with pytest.raises(UserError, match=r"another process \(pid \d+\) is training"):
            restore_earlier_run(config)


def test_a_packed_run_is_a_model_to_begin_from(config, mount, root, tmp_path):
    folder = mount(packed=True)
    run_dir = root / "temp" / "jgpt" / "init_from"
    (root / "temp").mkdir()
    assert unpack_model(str(folder)) == str(run_dir)
    assert read_meta(run_dir / "checkpoints", 4)["step"] == 4
    (run_dir / "checkpoints" / "8.sha256").touch()  # of another model that a cell before began from
    assert unpack_model(str(folder)) == str(run_dir) and packing.checkpoints_in(run_dir) == [2, 4]
    for name in ("", "gpt2", str(tmp_path), str(mount(MOUNTS[1]))):
        assert unpack_model(name) == name
    assert packing.checkpoints_in(folder) == [2, 4]
