"""What is written is there whole or not at all, whoever else writes it at the same time."""

from pathlib import Path

import pytest

import jgpt
from jgpt.atomic_write import atomic_directory, atomic_file, remove_leftovers, write_file


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path, "w") as first:
        first.write("the first, which is longer")
        with atomic_file(path, "w") as second:
            second.write("the second")
            assert not path.exists()
        assert path.read_text() == "the second"
    assert path.read_text() == "the first, which is longer"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_directory_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with pytest.raises(OSError, match="directory"), atomic_directory(path) as first:
        (first / "a").write_text("first")
        with atomic_directory(path) as second:
            (second / "b").write_text("second")
    assert list(tmp_path.iterdir()) == [path] and (path / "b").read_text() == "second"
    assert not (path / "a").exists()


def test_nothing_is_left_of_what_was_interrupted_or_killed(tmp_path: Path) -> None:
    for interrupted in (atomic_file, atomic_directory):
        with pytest.raises(KeyboardInterrupt), interrupted(tmp_path / "file"):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / "file.12-0123abcd.tmp").write_text("of a killed process")
    (tmp_path / "notes.tmp").write_text("of the user")
    write_file(tmp_path / "file", "whole")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.tmp"]


def test_temporary_names_are_made_in_one_place() -> None:
    """A fixed name, such as "train.bin.tmp", is shared by all processes: one truncates what the other writes."""
    package = Path(jgpt.__file__).parent
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if '.tmp"' in path.read_text("utf-8")}
    globs = {"kaggle/session/pack.py", "kaggle/session/publish.py"}  # they leave such files out
    alone = {"kaggle/session/bootstrap.py"}  # it runs before the rest of the package is there
    assert found - globs - alone == {"atomic_write.py"}
