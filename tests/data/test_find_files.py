"""Names to files: each real file once, loops end, and what is left out is said."""

import os
from pathlib import Path

import pytest

from jgpt.data import find_files as module
from jgpt.data.find_files import find_files
from jgpt.errors import UserError


def write(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_globs_directories_and_lists_are_taken(tmp_path: Path) -> None:
    a, b = write(tmp_path / "x/a.txt"), write(tmp_path / "x/y/b.md.gz")
    odd, _ = write(tmp_path / "odd [1].py"), write(tmp_path / "x/notes.csv")
    c = write(tmp_path / "data [v2]/z/c.txt")
    write(tmp_path / "x/.hidden/d.txt")
    write(tmp_path / "x/.e.txt")
    assert find_files(str(tmp_path / "x")) == [a, b]
    assert find_files(f"{tmp_path}/x/*, {tmp_path}/x/**/*.gz,{a}") == [a, b]
    assert find_files(str(odd)) == [odd]
    assert find_files(f"{tmp_path}/data [v2]/**/*.txt") == [c]
    assert find_files(f"{tmp_path}/**/y/**/b.*") == find_files(f"{tmp_path}/x/?/*") == [b]
    assert find_files(f"{tmp_path}/x/**") == [a, b]
    assert find_files(f"{tmp_path}/x/.h*/*.txt") == [tmp_path / "x/.hidden/d.txt"]


def test_relative_names_and_the_home_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a.txt"), write(tmp_path / "b/b.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("*.txt") == find_files("./*.txt") == find_files("~/a.txt") == [a]
    assert find_files("**/*.txt") == find_files(".") == find_files("b/../**/*.txt") == [a, b]


def test_each_real_file_is_read_once_and_loops_of_links_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "z"
    a, b = write(folder / "a.txt"), write(folder / "deep/b.txt")
    for i in range(30):  # 2 ** 30 ways through them
        (folder / f"loop{i}").symlink_to(".")
    (folder / "deep/up").symlink_to("../..")
    (tmp_path / "linked").symlink_to(folder)
    (folder / "soft.txt").symlink_to("a.txt")
    os.link(b, folder / "hard.txt")
    for glob in (str(folder), f"{tmp_path}/**/*.txt", f"{folder}/loop1/**/*.txt,{folder}/loop2"):
        found = find_files(glob)
        assert len(found) == 2 and {file.stat().st_ino for file in found} == {a.stat().st_ino, b.stat().st_ino}
    assert find_files(str(folder))[0] == a
    assert find_files(f"{tmp_path}/linked/**/a.txt")[0].samefile(a)
    caplog.clear()
    with caplog.at_level("INFO", "jgpt"):
        find_files(str(folder))
    assert "text: 2 file(s); left out: 2 link(s) to another of these files" in caplog.text


def test_files_of_one_inode_and_other_size_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems give 0, or one number, to all files."""
    a, b, real = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "other"), os.stat
    for inode in (0, 7):

        def stat(path: str, n: int = inode, **options: bool) -> os.stat_result:
            mode, _, *others = real(path, **options)
            return os.stat_result((mode, n, *others))

        monkeypatch.setattr(module.os, "stat", stat)
        found = find_files(str(tmp_path))
        monkeypatch.setattr(module.os, "stat", real)
        assert found == [a, b]


def test_suffixes_count_in_any_case_and_the_others_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book, readme = write(tmp_path / "BOOK1.TXT"), write(tmp_path / "README.md")
    data, plain = write(tmp_path / "data.csv"), write(tmp_path / "LICENSE")
    write(tmp_path / "posts.json")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    with caplog.at_level("INFO", "jgpt"):
        assert find_files(str(tmp_path)) == [book, readme]
    expected = "left out: 1 .csv, 1 .json, 1 broken link(s), 1 pipe(s) or device(s), 1 without a suffix (a glob that"
    assert expected in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "jgpt"):  # who names a suffix or a file means it
        assert find_files(f"{tmp_path}/*.csv,{plain}") == [plain, data]
    assert "text: read as plain text: 1 .csv, 1 without a suffix" in caplog.text and "left out" not in caplog.text
    write(tmp_path / "below/more.txt")
    with caplog.at_level("INFO", "jgpt"):
        find_files(f"{tmp_path}/*")
    assert "1 folder(s)" in caplog.text


def test_a_comma_may_be_in_a_name(tmp_path: Path) -> None:
    a, b = write(tmp_path / "Dickens, Charles.txt"), write(tmp_path / "b,c/d.txt")
    other = write(tmp_path / "other.txt")
    assert find_files(str(a)) == [a]
    assert find_files(f"{other}, {a} ,{tmp_path}/b,c") == [a, b, other]
    assert find_files(f"{tmp_path}/Dickens, *.txt") == [a]


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t.csv", "1,2")
    with pytest.raises(UserError, match=r"nothing.* matches no file \(current folder.*\.parquet.*Set data.text_glob"):
        find_files(f"{tmp_path}/nothing*.txt")
    for part in (f"{tmp_path}/*", str(tmp_path)):
        with pytest.raises(UserError, match=r"only files that are not text \(\.csv\)"):
            find_files(part)
    with pytest.raises(UserError, match="text_glob is empty"):
        find_files(" , ")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(UserError, match=r"only files that are not text \(broken link\(s\)\)"):
        find_files(f"{tmp_path}/loop.txt")

    def locked(folder: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.os, "listdir", locked)
    with pytest.raises(UserError, match=rf"the folder {tmp_path} cannot be listed: Permission denied"):
        find_files(str(tmp_path))
