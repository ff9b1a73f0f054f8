"""Preparing in parts: any number gives the same tokens, a part that was lost is repeated, none is left out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from processes_at_once import FORK
from test_shards import make_config

from jgpt.data import parts, write_shards
from jgpt.data.parts import Part, parse_part, part_directory, range_of
from jgpt.data.token_directory import token_directory
from jgpt.data.token_files import TokenData, open_token_data
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.write_tokens import prepare, prepare_part
from jgpt.errors import UserError
from jgpt.file_lock import LOCK


def same(a: TokenData, b: TokenData) -> bool:
    assert a.tokenizer.sha256 == b.tokenizer.sha256
    return np.array_equal(a.train[:], b.train[:]) and np.array_equal(a.val[:], b.val[:])


def expected(config: ConfigDict, root: Path) -> TokenData:
    """Return the tokens that one process makes, elsewhere."""
    config = config.copy_and_resolve_references()
    config.data.cache_dir = str(root / "expected")
    return prepare(config)


@pytest.mark.parametrize("n", [1, 3, 20])  # 20: more than there are files
@pytest.mark.parametrize("lines", [30, 0])  # 0: few documents, split by position
def test_any_number_of_parts_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, lines: int
) -> None:
    config = make_config(tmp_path, lines)
    whole = expected(config, tmp_path)
    monkeypatch.setattr(write_shards, "SHARD_BYTES", 3000)
    *others, last = reversed(range(n))
    assert all(prepare_part(config, Part(i, n)) is None for i in others)
    data = prepare_part(config, Part(last, n))
    assert data is not None and same(data, whole)
    for key in whole.meta.keys() - {"train_shards", "val_shards", "meta_sha256"}:
        assert data.meta[key] == whole.meta[key], key
    assert same(prepare(config), whole) and same(prepare_part(config, Part(0, n)) or whole, whole)
    names = {path.name for path in token_directory(config).iterdir()}
    shards = [shard["file"] for split in ("train", "val") for shard in data.meta[f"{split}_shards"]]
    assert names == {LOCK, "meta.json", "tokenizer", *shards}  # no parts are left


def test_files_are_shared_by_their_bytes_and_each_has_one_owner() -> None:
    for sizes in ([5, 1, 1, 1, 9, 0, 0, 3], [0, 0], [7], []):
        for n in range(1, 10):
            owned = [i for index in range(n) for i in range_of(sizes, Part(index, n))]
            assert owned == list(range(len(sizes))), (sizes, n)
    assert [len(range_of([100] * 40, Part(i, 4))) for i in range(4)] == [10] * 4
    assert [sum([300, 100, 100, 100][i] for i in range_of([300, 100, 100, 100], Part(j, 2))) for j in (0, 1)] == [
        300
    ] * 2


def test_one_tokenizer_is_made_from_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    (tmp_path / "texts" / "9.txt").write_text("ʘ is in the last part only. " * 20)
    prepare_part(config, Part(0, 2))
    made = (token_directory(config) / "tokenizer" / "tokenizer.json").read_text()
    assert "ʘ" in made
    monkeypatch.setattr("jgpt.data.write_tokens.make_tokenizer", None)  # it is not made again
    assert prepare_part(config, Part(1, 2)) is not None
    assert (token_directory(config) / "tokenizer" / "tokenizer.json").read_text() == made


def test_a_part_that_fails_is_repeated_and_the_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    whole = expected(config, tmp_path)
    directory = token_directory(config)
    prepare_part(config, Part(0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", None)
        with pytest.raises(TypeError):
            prepare_part(config, Part(1, 3))
    assert not list(part_directory(directory, Part(1, 3)).glob("[!.]*"))
    assert prepare_part(config, Part(2, 3)) is None
    at = {path: path.stat().st_mtime_ns for path in part_directory(directory, Part(0, 3)).iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", None)
        assert prepare_part(config, Part(0, 3)) is None  # it is complete: nothing is encoded
    assert {path: path.stat().st_mtime_ns for path in at if path.name != LOCK} == {
        path: time for path, time in at.items() if path.name != LOCK
    }
    data = prepare_part(config, Part(1, 3))
    assert data is not None and same(data, whole)


def test_a_directory_with_a_part_missing_is_never_taken_for_whole(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    whole = expected(config, tmp_path)
    directory = token_directory(config)
    for i in (0, 2, 3):
        prepare_part(config, Part(i, 4))
    with pytest.raises(UserError, match="holds no complete token files"):
        open_token_data(directory)
    with pytest.raises(UserError, match=r"in 4 shards, and not all are complete \(missing: 1/4\).*--shard=1/4"):
        prepare(config)
    path = next(part_directory(directory, Part(2, 4)).glob("train_*.bin"))
    path.write_bytes(path.read_bytes()[:-2])  # a part that is complete loses a byte before all are joined
    assert prepare_part(config, Part(1, 4)) is None
    with pytest.raises(UserError, match=r"\(missing: 2/4\)"):
        prepare(config)
    data = prepare_part(config, Part(2, 4))
    assert data is not None and same(data, whole)


@pytest.mark.parametrize("lines", [30, 0])
def test_joining_that_was_killed_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    monkeypatch.setattr(write_shards, "SHARD_BYTES", 3000)
    config = make_config(tmp_path, lines)
    whole = expected(config, tmp_path)
    prepare_part(config, Part(0, 2))
    rename, n_renamed = Path.replace, [0]

    class Killed(BaseException):
        pass

    for killed_at in range(1, 100):
        n_renamed[0] = 0

        def replace(path: Path, target: Path, killed_at: int = killed_at) -> Path:
            n_renamed[0] += target.parent == token_directory(config)
            if n_renamed[0] == killed_at:
                raise Killed
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace)
            try:
                data = prepare_part(config, Part(1, 2))
                break
            except Killed:
                with pytest.raises(UserError, match="holds no complete token files"):
                    open_token_data(token_directory(config))
    assert killed_at > 3 and data is not None and same(data, whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("n", "they are 2 parts, and --shard says 3"),
        ("data.val_fraction", "data.val_fraction is 0.1 there, and 0.2 here"),
        ("tokenizer.kind", "tokenizer.kind is 'char' there, and 'bpe' here; tokenizer.vocab_size is None there"),
        ("touch", r"the text is not the same \(a name or a time of change differs\)"),
        ("more", r"the text is not the same \(it is 16 files with [\d,]+ bytes there, and 17 files with "),
    ],
)
def test_parts_of_different_texts_or_settings_do_not_meet(tmp_path: Path, change: str, said: str) -> None:
    config = make_config(tmp_path)
    prepare_part(config, Part(0, 2))
    n = 3 if change == "n" else 2
    if change == "touch":
        os.utime(tmp_path / "texts" / "0.txt", ns=(1, 1))
    elif change == "more":
        (tmp_path / "texts" / "more.txt").write_text("more")
    elif change != "n":
        config.update_from_flattened_dict({change: "bpe" if change == "tokenizer.kind" else 0.2})
    with pytest.raises(UserError, match=rf"--shard=1/{n} does not belong to the shards in .*parts: {said}.*delete"):
        prepare_part(config, Part(1, n))
    shutil.rmtree(token_directory(config) / "parts")  # what the message advises
    assert all(prepare_part(config, Part(i, n)) is None for i in range(n - 1))
    data = prepare_part(config, Part(n - 1, n))
    assert data is not None and same(data, expected(config, tmp_path))


def test_new_parts_take_the_place_of_old_tokens_and_of_one_process_that_was_killed(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    prepare(config)
    (tmp_path / "texts" / "0.txt").write_text("new text")
    parts.write_plan(token_directory(config), {"n_parts": 1})
    assert prepare_part(config, Part(1, 2)) is None
    data = prepare_part(config, Part(0, 2))
    assert data is not None and same(data, expected(config, tmp_path))


def test_an_empty_text_is_refused_by_the_last_part(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for path in (tmp_path / "texts").iterdir():
        path.write_text("")
    assert prepare_part(config, Part(0, 2)) is None
    with pytest.raises(UserError, match="hold no text"):
        prepare_part(config, Part(1, 2))


def test_conversations_are_prepared_by_one_process(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.data.format = "chat"
    with pytest.raises(UserError, match="--shard=0/2 and data.format='chat' were given"):
        prepare_part(config, Part(0, 2))


@pytest.mark.parametrize("text", ["", "4", "4/4", "0/0", "-1/4", "1/4/2", "a/b", "1.0/4", "0/4 "])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shard=.*: it must be INDEX/NUMBER"):
        parse_part(text)
    assert parse_part("3/4") == Part(3, 4)


def test_more_parts_than_anybody_looks_through_are_refused() -> None:
    with pytest.raises(UserError, match="--shard=0/999999999: there are at most 10,000 shards"):
        parse_part("0/999999999")
    assert parse_part("9999/10000") == Part(9999, 10_000)


AT_ONCE = (
    FORK
    + """
from jgpt.data.parts import Part
from jgpt.data.write_tokens import prepare_part

def start(index, killed_at=0):
    return fork(lambda: 7 if prepare_part(config, Part(index, 3)) else 0, killed_at)

assert sorted(ends(start(0), start(1), start(2)))[-1] == 7  # 7: all are there
whole, killed_at, codes = content(), 0, [0, -9]
while -9 in codes:  # at every seventh event of the file system, until there are no more
    shutil.rmtree(directory)
    killed_at += 7
    codes = ends(start(0), start(1, killed_at), start(2))
    assert codes[0] in (0, 7) and codes[1] in (-9, 0, 7) and codes[2] in (0, 7), (killed_at, codes)
    if -9 in codes:
        assert ends(start(1)) == [7], killed_at  # the same command again
    assert content() == whole, (killed_at, set(content()) ^ set(whole))
print("killed", killed_at // 7 - 1, "times")
"""
)


def test_processes_at_once_agree_and_one_that_is_killed_at_any_moment_is_repeated(tmp_path: Path) -> None:
    config = make_config(tmp_path, 2)
    command = [sys.executable, "-c", AT_ONCE, config.data.text_glob, config.data.cache_dir]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert int(result.stdout.split()[-2]) > 5
    assert same(open_token_data(token_directory(config)), expected(config, tmp_path))
