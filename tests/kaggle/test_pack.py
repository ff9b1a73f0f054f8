"""Packing: a run directory as few flat files and back, whenever it is killed, and nothing outside is ever touched."""

import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from jgpt.errors import UserError
from jgpt.kaggle.session.pack import checkpoints_in, pack, unpack
from jgpt.run_dir.manifest import digest, verify, whole_steps


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def before(own_run):
    (own_run / ".lock").unlink()
    return contents(own_run)


def test_packed_there_is_no_folder_and_unpacked_it_is_what_it_was(own_run, before, tmp_path):
    pack(own_run)
    assert not any(path.is_dir() for path in own_run.iterdir())
    assert {p.name for p in own_run.glob("*.tar")} >= {"checkpoint-2.tar", "checkpoint-4.tar", "tokenizer.tar"}
    assert checkpoints_in(own_run) == [2, 4]
    unpack(own_run, tmp_path / "back")
    assert {name: data for name, data in contents(tmp_path / "back").items()} == before
    unpack(own_run, own_run)  # in place
    assert contents(own_run) == before
    assert [verify(own_run / "checkpoints", step) for step in whole_steps(own_run / "checkpoints")] == ["", ""]


def test_a_run_that_was_never_packed_is_copied(own_run, before, tmp_path):
    unpack(own_run, tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_tars_say_nothing_of_who_made_them(own_run):
    pack(own_run)
    with tarfile.open(own_run / "checkpoint-4.tar") as tar:
        members = tar.getmembers()
    assert {(m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, "", "")}
    assert members[0].name == "4" and members[-1].name == "4.sha256"


def test_what_was_cut_off_while_it_was_saved_is_dropped(own_run):
    (own_run / "checkpoints" / "4.sha256").unlink()
    (own_run / "checkpoints" / "6.orbax-checkpoint-tmp-1").mkdir()
    pack(own_run)
    assert checkpoints_in(own_run) == [2] and not (own_run / "checkpoints").exists()


class Killed(BaseException):
    """The end of a process, here."""


def killed(work: Callable[[], None], moment: int) -> bool:
    """Work until the change on disk after the first `moment` of them; tell whether there was one."""
    changes = 0

    def counted(call):
        def change(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes > moment:
                raise Killed
            return call(*arguments, **options)

        return change

    with mock.patch("os.fsync", counted(os.fsync)), mock.patch("shutil.rmtree", counted(shutil.rmtree)):
        with mock.patch.object(Path, "replace", counted(Path.replace)):
            with mock.patch.object(Path, "unlink", counted(Path.unlink)):
                try:
                    work()
                except Killed:
                    return True
    return False


@pytest.mark.parametrize("packed_before", [False, True])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, packed_before):
    """Packing, or unpacking in place, is cut off; what is there then unpacks to all that was there."""
    own_run = tmp_path / "run"
    names = ["config.json", "metrics.jsonl", "tokenizer/tokenizer.json"]
    for name in [
        *names,
        "checkpoints/2/params",
        "checkpoints/2.sha256",
        "checkpoints/4/params",
        "checkpoints/4.sha256",
    ]:
        (own_run / name).parent.mkdir(parents=True, exist_ok=True)
        (own_run / name).write_text(name)
    before = contents(own_run)
    if packed_before:
        pack(own_run)
    for moment in range(100):
        run = tmp_path / str(moment)
        shutil.copytree(own_run, run)
        cut_off = killed(lambda: unpack(run, run) if packed_before else pack(run), moment)  # noqa: B023
        unpack(run, tmp_path / f"{moment}-elsewhere")
        assert {**contents(tmp_path / f"{moment}-elsewhere"), **before} == contents(tmp_path / f"{moment}-elsewhere")
        unpack(run, run)
        assert contents(run) == before
        if not cut_off:
            break
    assert moment > 8  # that many changes were cut off


def test_a_full_disk_leaves_what_was_there(own_run, before):
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        with pytest.raises(OSError, match="No space"):
            pack(own_run)
    assert contents(own_run) == before


def test_the_command_says_that_it_left_things_unpacked(own_run, before):
    (own_run / "checkpoint-2.tar").mkdir()  # in the way
    (own_run / "checkpoint-2.tar" / "x").touch()
    found = subprocess.run([sys.executable, "-m", "jgpt.kaggle.session.pack", own_run], capture_output=True, text=True)
    assert found.returncode == 0 and "not packed" in found.stderr
    assert {name: data for name, data in contents(own_run).items() if name in before} == before


def test_a_torn_tar_is_named_and_passed_over(own_run, tmp_path, caplog):
    pack(own_run)
    tar = own_run / "checkpoint-4.tar"
    os.truncate(tar, tar.stat().st_size // 2)
    (own_run / "checkpoint-2.tar").write_bytes(b"no tar at all" * 100)
    unpack(own_run, tmp_path / "back")
    assert whole_steps(tmp_path / "back" / "checkpoints") == []
    assert "checkpoint-4.tar is damaged and skipped" in caplog.text and "checkpoint-2.tar" in caplog.text
    assert (tmp_path / "back" / "tokenizer" / "tokenizer.json").is_file()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


@pytest.mark.parametrize(
    "bad",
    [member("../../outside"), member("4/../../../outside"), member("4", tarfile.SYMTYPE, "/etc"),
     member("4/x", tarfile.LNKTYPE, "../../outside"), member("4/x", tarfile.CHRTYPE)],
    ids=lambda m: m.name,
)  # fmt: skip
def test_a_tar_that_leads_outside_is_refused(tmp_path, bad):
    source = tmp_path / "deep" / "source"
    source.mkdir(parents=True)
    with tarfile.open(source / "checkpoint-4.tar", "w") as tar:
        tar.addfile(bad, io.BytesIO())
    with pytest.raises(UserError, match="was not packed by a run"):
        unpack(source, tmp_path / "deep" / "run")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "deep" / "outside").exists()
    assert contents(tmp_path / "deep" / "run") == {}


def test_a_sparse_file_that_stands_for_terabytes_is_refused(tmp_path):
    """GNU tar's format: 512 bytes of data, and 3 TB when they are unpacked."""
    (tmp_path / "source").mkdir()
    sparse = tarfile.TarInfo("4/data")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 512)  # one piece: its offset, its size
    header[483:495] = b"\x80" + (3 * 10**12).to_bytes(11, "big")  # the size of the whole
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 0x20 + sum(header[156:]))
    (tmp_path / "source" / "checkpoint-4.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    with pytest.raises(UserError, match="was not packed by a run: 4/data is a sparse file"):
        unpack(tmp_path / "source", tmp_path / "run")
    assert contents(tmp_path / "run") == {}


def test_more_than_the_disk_holds_is_not_begun(own_run, tmp_path):
    """Such as a sparse file of terabytes in a folder."""
    with mock.patch.object(shutil, "disk_usage", lambda path: mock.Mock(free=1000)):
        with pytest.raises(OSError, match="GB are free") as error:
            unpack(own_run, tmp_path / "back")
    assert error.value.errno == errno.ENOSPC


def test_links_are_not_followed(own_run, tmp_path, caplog):
    """They may lead to the user's own files, which a later upload would publish."""
    (tmp_path / "secret").write_text("mine")
    for name in ("samples.txt", "checkpoints/4/link", "tokenizer/tokenizer.json"):
        (own_run / name).unlink(missing_ok=True)
        (own_run / name).symlink_to(tmp_path / "secret")
    (own_run / "export").symlink_to(tmp_path)
    unpack(own_run, tmp_path / "back")
    assert b"mine" not in contents(tmp_path / "back").values() and not (tmp_path / "back" / "samples.txt").exists()
    assert whole_steps(tmp_path / "back" / "checkpoints") == [2]
    assert "samples.txt is a link, and left out" in caplog.text and "is a link, and a run writes none" in caplog.text


def test_an_absolute_name_lands_inside_and_what_else_a_tar_holds_does_not(tmp_path, caplog):
    with tarfile.open(tmp_path / "checkpoint-4.tar", "w") as tar:
        for name in (f"{tmp_path}/outside", "4/data", "4.sha256"):
            tar.addfile(member(name), io.BytesIO())
    unpack(tmp_path, tmp_path / "run")
    assert not (tmp_path / "outside").exists() and contents(tmp_path / "run") == {}
    assert "damaged" in caplog.text


def test_tars_that_kaggle_has_unpacked_into_folders_are_found(own_run, before, tmp_path):
    pack(own_run)
    for tar in own_run.glob("*.tar"):
        with tarfile.open(tar) as opened:
            opened.extractall(tar.with_suffix(""), filter="data")
        tar.unlink()
    assert checkpoints_in(own_run) == [2, 4]
    unpack(own_run, tmp_path / "back")
    assert contents(tmp_path / "back") == before


def test_checkpoints_that_nobody_judged_are_left(own_run: Path, caplog: pytest.LogCaptureFixture):
    """Two without a manifest: somebody removed those, and the run that found them refused to go on."""
    for step in (2, 4):
        (own_run / "checkpoints" / f"{step}.sha256").unlink()
    before = digest(own_run / "checkpoints")
    pack(own_run)
    assert digest(own_run / "checkpoints") == before and "steps 2, 4 have no manifest" in caplog.text
    assert (own_run / "tokenizer.tar").is_file() and not (own_run / "checkpoints.tar").exists()
