"""Token files: what is in them, when they are made again, and that an incomplete directory is never used."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from processes_at_once import FORK

from jgpt.config.defaults import default_config
from jgpt.data import token_directory as memmap
from jgpt.data import token_files, write_shards, write_tokens
from jgpt.data.token_directory import token_directory
from jgpt.data.token_files import open_token_data
from jgpt.data.tokenizer import Tokenizer, train_char
from jgpt.data.write_tokens import prepare
from jgpt.errors import UserError
from jgpt.file_lock import LOCK

WORDS = "the a one two def return naïve 漢字 🙂 class self 12 \n".split(" ")


def make_config(root: Path, n_documents: int = 40, kind: str = "char") -> ConfigDict:
    """Write documents of random words, and return a config that reads them."""
    rng = random.Random(n_documents)
    (root / "texts").mkdir(exist_ok=True)
    for i in range(n_documents):
        text = " ".join(rng.choices(WORDS, k=300))
        (root / "texts" / f"{i:03}.txt").write_text(text, encoding="utf-8", newline="")
    config = default_config()
    config.out_dir = str(root / "run")
    config.data.text_glob = str(root / "texts")
    config.tokenizer.kind = kind
    config.tokenizer.vocab_size = 300
    return config


def texts(config: ConfigDict) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path(config.data.text_glob).iterdir())]


def state(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Return what would change if a file were written again; the lock's, which says who holds it, is left out."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != LOCK]
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }


def contents(directory: Path) -> dict[str, str]:
    return {name: digest for name, (_, _, digest) in state(directory).items()}


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_documents_are_all_there_and_every_tenth_is_held_out(tmp_path: Path, kind: str) -> None:
    config = make_config(tmp_path, kind=kind)
    data = prepare(config)
    end, all_texts = "<|endoftext|>", texts(config)
    expected_val = [text for i, text in enumerate(all_texts) if i % 10 == 9]
    expected_train = [text for i, text in enumerate(all_texts) if i % 10 != 9]
    assert data.tokenizer.decode(data.train) == "".join(text + end for text in expected_train)
    assert data.tokenizer.decode(data.val) == "".join(text + end for text in expected_val)
    assert isinstance(data.train, np.memmap) and data.train.dtype == np.uint16
    directory = tmp_path / "run" / "tokens"
    assert token_directory(config) == directory
    meta = json.loads((directory / "meta.json").read_text())
    assert meta == data.meta
    assert meta["val_bytes"] == sum(len(text.encode()) for text in expected_val)
    assert meta["train_bytes"] == sum(len(text.encode()) for text in expected_train)
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(data.train), len(data.val))
    assert (meta["n_documents"], meta["split"], meta["tokenizer_kind"]) == (40, "document", kind)
    assert (meta["vocab_size"], meta["eot_id"]) == (data.tokenizer.vocab_size, data.tokenizer.eot_id)
    assert meta["train_sha256"] == hashlib.sha256((directory / "train_00000.bin").read_bytes()).hexdigest()
    for split in ("train", "val"):
        [shard], path = meta[f"{split}_shards"], directory / f"{split}_00000.bin"
        assert (shard["file"], shard["bytes"]) == (path.name, path.stat().st_size)
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    names = [LOCK, "meta.json", "tokenizer", "train_00000.bin", "val_00000.bin"]
    assert sorted(path.name for path in directory.iterdir()) == names


@pytest.mark.parametrize(("n_documents", "kind"), [(1, "char"), (1, "bpe"), (3, "char")])
def test_few_documents_are_split_by_position(tmp_path: Path, n_documents: int, kind: str) -> None:
    config = make_config(tmp_path, n_documents, kind)
    data = prepare(config)
    total = len(data.train) + len(data.val)
    assert data.meta["split"] == "position" and len(data.val) == round(total / 10)
    text = data.tokenizer.decode(np.concatenate([data.train, data.val]))
    assert text == "".join(document + "<|endoftext|>" for document in texts(config))
    exact = len(data.tokenizer.decode(data.val).replace("<|endoftext|>", "").encode())
    assert abs(data.meta["val_bytes"] - exact) <= 6
    all_bytes = sum(len(document.encode()) for document in texts(config))
    assert data.meta["train_bytes"] + data.meta["val_bytes"] == all_bytes


def test_a_long_document_is_one_document(tmp_path: Path) -> None:
    config = make_config(tmp_path, 1)
    text = "".join(random.Random(0).choices(WORDS, k=300_000))
    (tmp_path / "texts" / "000.txt").write_text(text, encoding="utf-8", newline="")
    data = prepare(config)
    ids = np.concatenate([data.train, data.val])
    assert data.meta["n_documents"] == 1 and np.flatnonzero(ids == data.tokenizer.eot_id).tolist() == [len(ids) - 1]
    assert np.array_equal(ids[:-1], data.tokenizer.encode(text))


def test_ids_past_65535_are_stored_in_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, 2)
    characters = "".join(map(chr, [*range(0x100, 0xD800), *range(0x10000, 0x13000)]))
    (tmp_path / "texts" / "001.txt").write_text(characters, encoding="utf-8", newline="")
    data = prepare(config)
    assert data.tokenizer.vocab_size > 1 << 16
    assert data.train.dtype == np.uint32 and max(data.train.max(), data.val.max()) > 65_535
    assert characters in data.tokenizer.decode(np.concatenate([data.train, data.val]))
    config.data.text_glob = str(tmp_path / "texts" / "000.txt")
    for n_special, dtype in ((65_534, np.uint16), (65_535, np.uint32)):  # 65,536 ids still fit in two bytes
        wide = train_char(
            ["".join(chr(code) for code in range(0x20, 0x11000) if not 0xD800 <= code < 0xE000)[:n_special]]
        )
        wide.save(tmp_path / "wide", 8)
        assert prepare(config, tmp_path / "wide").train.dtype == dtype


def test_nothing_is_written_when_nothing_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    first = prepare(config)
    before = state(token_directory(config))
    with caplog.at_level("INFO", "jgpt"):
        again = prepare(config)
        assert "up to date" in caplog.text
        prepare(config, token_directory(config) / "tokenizer")
    config.tokenizer.vocab_size = 999  # of no matter to char
    prepare(config)
    assert state(token_directory(config)) == before
    assert np.array_equal(first.train, again.train)


@pytest.mark.parametrize(
    "change",
    ["data.val_fraction=0.2", "data.encoding_errors='replace'", "tokenizer.kind='bpe'", "touch", "new file"],
)
def test_a_change_makes_new_ones(tmp_path: Path, change: str) -> None:
    config = make_config(tmp_path)
    first = prepare(config).meta
    if change == "touch":
        os.utime(tmp_path / "texts" / "000.txt", ns=(1, 1))
    elif change == "new file":
        (tmp_path / "texts" / "new.txt").write_text("more")
    else:
        name, value = change.split("=")
        config.update_from_flattened_dict({name: eval(value)})
    second = prepare(config).meta
    assert second["fingerprint"] != first["fingerprint"]
    assert second == prepare(config).meta


def test_a_run_that_goes_on_keeps_its_tokenizer(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    prepare(config).tokenizer.save(tmp_path / "run" / "tokenizer", 8)
    (tmp_path / "texts" / "new.txt").write_text("ʘ" * 1000)
    resumed = prepare(config, tmp_path / "run" / "tokenizer")
    assert "ʘ" not in resumed.tokenizer.decode(resumed.train) and resumed.meta["tokenizer_given"]
    before = state(token_directory(config))
    prepare(config, tmp_path / "run" / "tokenizer")
    assert state(token_directory(config)) == before
    fresh = prepare(config)  # a new run learns its own
    assert fresh.tokenizer.sha256 != resumed.tokenizer.sha256


class Crash(Exception):
    """The plug is pulled."""


@pytest.mark.parametrize("at", ["encode", "sync", "replace", "replace meta"])
def test_a_crash_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    config = make_config(tmp_path)
    prepare(config)
    whole = contents(token_directory(config))
    os.utime(tmp_path / "texts" / "000.txt", ns=(1, 1))
    rename = Path.replace

    def crash(*_: object) -> None:
        raise Crash

    def crash_at_rename(path: Path, target: Path) -> Path:
        if target.name == ("meta.json" if at == "replace meta" else "val_00000.bin"):
            raise Crash
        return rename(path, target)

    with monkeypatch.context() as patch:
        if at == "encode":
            patch.setattr(Tokenizer, "encode_batch", crash)
        elif at == "sync":
            patch.setattr(os, "fsync", crash)
        else:
            patch.setattr(Path, "replace", crash_at_rename)
        with pytest.raises(Crash):
            prepare(config)
    with pytest.raises(UserError, match="holds no complete token files"):
        open_token_data(token_directory(config))
    assert not list(token_directory(config).glob("*.tmp"))
    prepare(config)
    rerun = contents(token_directory(config))
    assert {**rerun, "meta.json": ""} == {**whole, "meta.json": ""}


RACE = (
    FORK
    + """
from jgpt.data.write_tokens import prepare

def prepared():
    data = prepare(config)
    assert data.train.tobytes() == expected[0] and data.val.tobytes() == expected[1]
    return 0

def start(killed_at=0):
    return fork(prepared, killed_at)

data = prepare(config)
expected = data.train.tobytes(), data.val.tobytes()
whole, killed_at, killed = content(), 0, -9
while killed == -9:  # at each event of the file system, until there are no more
    shutil.rmtree(directory)
    killed_at += 1
    killed, lived = ends(start(killed_at), start())
    assert killed in (-9, 0) and lived == 0, (killed_at, killed, lived)
    assert content() == whole, (killed_at, set(content()) ^ set(whole))
shutil.rmtree(directory)
assert ends(*(start() for _ in range(4))) == [0] * 4 and content() == whole
print("killed", killed_at - 1, "times")
"""
)


def test_processes_that_prepare_one_directory_agree_even_when_one_is_killed_at_any_moment(tmp_path: Path) -> None:
    config = make_config(tmp_path, 3)
    command = [sys.executable, "-c", RACE, config.data.text_glob, str(tmp_path / "tokens")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert int(result.stdout.split()[-2]) > 10


def test_damage_is_named_and_nothing_is_rebuilt_behind_the_users_back(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    directory = token_directory(config)
    prepare(config)
    good = tmp_path / "good"
    shutil.copytree(directory, good)

    path = directory / "train_00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    for opening in (lambda: prepare(config), lambda: open_token_data(directory)):
        with pytest.raises(
            UserError, match=rf"train_00000.bin is damaged: it has {size - 3:,} bytes, and {size:,} .*delete "
        ):
            opening()
    path.unlink()
    with pytest.raises(UserError, match="train_00000.bin is missing, one of the token files"):
        prepare(config)

    for split in ("train", "val"):  # one bit: the id is still one of the vocabulary
        shutil.copytree(good, directory, dirs_exist_ok=True)
        content = bytearray((directory / f"{split}_00000.bin").read_bytes())
        content[len(content) // 4 * 2] ^= 1
        (directory / f"{split}_00000.bin").write_bytes(content)
        for opening in (lambda: prepare(config), lambda: open_token_data(directory)):
            with pytest.raises(
                UserError, match=rf"{split}_00000.bin is damaged: it is not what was written, .*Put the file"
            ):
                opening()

    shutil.copytree(good, directory, dirs_exist_ok=True)
    train_char(["other"]).save(directory / "tokenizer", 8)
    with pytest.raises(UserError, match="is not the tokenizer that made"):
        prepare(config)
    shutil.rmtree(directory)  # what the messages advise
    assert len(prepare(config).train) == size // 2


def test_of_huge_files_some_parts_are_compared_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(write_shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(token_files, "MOST_CHUNKS", 3)
    config = make_config(tmp_path)
    with caplog.at_level("INFO", "jgpt"):
        data = prepare(config)
    n_parts = -(-data.train.nbytes // 1000)
    assert (
        n_parts > 5
        and f"train in {token_directory(config)}, 3 of {n_parts} parts were compared with their hashes" in caplog.text
    )
    path = token_directory(config) / "train_00000.bin"
    whole = path.read_bytes()
    for part in (0, (n_parts - 1) // 2, n_parts - 1):
        content = bytearray(whole)
        content[part * 1000] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"it is not what was written, somewhere in .* from {part * 1000:,} on"):
            prepare(config)
    monkeypatch.setattr(write_shards, "CHUNK_BYTES", 7)  # the files say for themselves what their hashes are of
    path.write_bytes(whole)
    assert np.array_equal(prepare(config).train, data.train)


@pytest.mark.parametrize(
    "changed", [("text", "matches no text here"), ("settings", "cannot serve instead: .*settings")]
)
def test_complete_tokens_stand_in_for_text_that_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: tuple[str, str]
) -> None:
    config = make_config(tmp_path)
    config.data.cache_dir = str(tmp_path / "tokens")
    first = prepare(config)
    shutil.rmtree(tmp_path / "texts")
    shutil.copytree(tmp_path / "tokens", tmp_path / "there")  # another machine
    config.data.cache_dir = str(tmp_path / "there")
    again = prepare(config)
    assert np.array_equal(again.train, first.train) and np.array_equal(again.val, first.val)
    assert "Training continues from the tokens in" in caplog.text and "from 40 files" in caplog.text
    prepare(config, tmp_path / "there" / "tokenizer")  # a run that goes on
    with pytest.raises(UserError, match="cannot serve instead: they were made with other settings"):
        config.data.val_fraction = 0.3
        prepare(config)
    config.data.text_glob += "/*.md"  # never had tokens: a mistake
    with pytest.raises(UserError, match=r"md' matches no file"):
        prepare(config)


def test_a_directory_of_inputs_is_read_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    first = prepare(config)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    (token_directory(config) / LOCK).unlink()
    for data in (prepare(config), open_token_data(token_directory(config))):
        assert np.array_equal(data.train, first.train)
    assert not (token_directory(config) / LOCK).exists()


def test_new_tokens_leave_those_of_a_running_run_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    running = prepare(config)
    train, val = running.train.copy(), running.val.copy()
    (tmp_path / "texts" / "000.txt").write_text("another text" * 1000)
    with caplog.at_level("INFO", "jgpt"):
        assert not np.array_equal(prepare(config).val, val)
    assert "are made again: the text has changed" in caplog.text
    assert isinstance(running.train, np.memmap)
    assert np.array_equal(running.train, train) and np.array_equal(running.val, val)


def test_text_that_vanishes_while_another_process_prepares_it_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    files = write_tokens.find_text(config)
    files[3].unlink()
    with pytest.raises(UserError, match=r"003.txt cannot be read: No such file"):
        prepare(config, files=files)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 0}', "{", "[" * 100_000])
def test_an_unreadable_meta_is_no_token_directory(tmp_path: Path, content: str) -> None:
    config = make_config(tmp_path)
    expected = prepare(config).meta
    (token_directory(config) / "meta.json").write_text(content)
    with pytest.raises(UserError, match="holds no complete token files"):
        open_token_data(token_directory(config))
    assert prepare(config).meta == expected


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, 0)
    (tmp_path / "texts" / "empty.txt").write_text("")
    for kind in ("char", "bpe"):
        config.tokenizer.kind = kind
        with pytest.raises(UserError, match="the 1 files that data.text_glob matches hold no text"):
            prepare(config)


def test_replaced_characters_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    (tmp_path / "texts" / "latin.txt").write_bytes("café ".encode("latin-1") * 1234)
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8: .* byte offset 3 "):
        prepare(config)
    config.data.encoding_errors = "replace_any"
    with caplog.at_level("INFO", "jgpt"):
        assert prepare(config).meta["replaced_characters"] == 1234
    assert "files 41, documents 41" in caplog.text and "1,234 characters replaced" in caplog.text


def test_a_mistake_in_the_tokenizers_name_costs_no_tokens(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    prepare(config)
    before = state(token_directory(config))
    config.tokenizer.kind, config.tokenizer.pretrained = "hf", str(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a directory"):
        prepare(config)
    assert state(token_directory(config)) == before


def test_somebody_elses_token_files_are_left_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.data.cache_dir = str(tmp_path / "nanogpt")
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt" / "train.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match="train.bin exists, and jgpt did not write it.*Set data.cache_dir to"):
        prepare(config)
    assert (tmp_path / "nanogpt" / "train.bin").read_bytes() == b"precious"


def test_a_full_or_unwritable_disk_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(memmap.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="has no space left: .*are needed.*data.cache_dir"):
            prepare(config)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="has no space left: "):
            prepare(config)
    assert not list(token_directory(config).glob("*.tmp"))
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "tokens")
    with pytest.raises(UserError, match="cannot be written: .*Something else has this name.*data.cache_dir") as refused:
        prepare(config)
    assert "Free space" not in str(refused.value)
