"""Token files in shards: they read as one stream, each is checked, and those of earlier versions are read."""

import errno
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data import write_shards
from jgpt.data.batches import Batches, make_batches, validation_blocks
from jgpt.data.blocks import blocks
from jgpt.data.packing import pack_rows
from jgpt.data.shards import ShardedTokens, join_shards
from jgpt.data.token_directory import token_directory, write_token_meta
from jgpt.data.token_files import open_token_data
from jgpt.data.words import to_words
from jgpt.data.write_tokens import prepare
from jgpt.errors import UserError

LIMIT = 1000  # bytes of a shard
WORDS = "the a one two def return naïve 漢字 🙂 class self 12 \n".split(" ")


def make_config(root: Path, n_lines: int = 30) -> ConfigDict:
    """Write files of one document and of several, or only three documents, and return a config that reads them."""
    rng = random.Random(n_lines)
    (root / "texts").mkdir()
    for i in range(8 if n_lines else 3):
        lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) for _ in range(n_lines)]
        (root / "texts" / f"{i}.jsonl").write_text("\n".join(lines))
        (root / "texts" / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=90 if n_lines else 600)))
    config = default_config()
    config.data.text_glob, config.data.cache_dir = str(root / "texts"), str(root / "tokens")
    config.tokenizer.kind = "char"
    return config


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_shards, "SHARD_BYTES", LIMIT)


def test_every_slice_is_that_of_one_array() -> None:
    whole = np.arange(23, dtype=np.uint16)
    tokens = ShardedTokens(np.split(whole, [5, 5, 6, 20]))  # one of them is empty
    assert len(tokens) == 23 and tokens.dtype == np.uint16
    for start in range(24):
        for stop in range(26):
            assert np.array_equal(tokens[start:stop], whole[start:stop]), (start, stop)
    assert np.array_equal(tokens[-4:-1], whole[-4:-1]) and np.array_equal(tokens[:], whole)
    assert np.shares_memory(tokens[6:20], whole)  # no copy within a shard
    assert len(join_shards([], np.dtype(np.uint16))) == 0 and join_shards([whole], whole.dtype) is whole


@pytest.mark.parametrize("lines", [30, 0])  # 0: few documents, split by position
def test_small_shards_hold_the_stream_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int) -> None:
    config = make_config(tmp_path, lines)
    one = prepare(config)
    config.data.cache_dir = str(tmp_path / "sharded")
    monkeypatch.setattr(write_shards, "SHARD_BYTES", LIMIT)
    sharded = prepare(config)
    for split in ("train", "val"):
        shards = sharded.meta[f"{split}_shards"]
        content = [(tmp_path / "sharded" / shard["file"]).read_bytes() for shard in shards]
        assert b"".join(content) == (tmp_path / "tokens" / f"{split}_00000.bin").read_bytes()
        assert [shard["sha256"] for shard in shards] == [hashlib.sha256(part).hexdigest() for part in content]
        assert max(map(len, content)) <= LIMIT
        assert [shard["file"] for shard in shards] == [f"{split}_{i:05}.bin" for i in range(len(shards))]
    assert len(sharded.meta["train_shards"]) > 3 and sharded.meta["split"] == ("document" if lines else "position")
    assert sharded.meta["train_sha256"] == hashlib.sha256(one.train.tobytes()).hexdigest()
    for key in one.meta.keys() - {"train_shards", "val_shards", "meta_sha256"}:
        assert sharded.meta[key] == one.meta[key], key
    assert np.array_equal(sharded.train[:], one.train) and np.array_equal(sharded.val[:], one.val)
    assert np.array_equal(open_token_data(tmp_path / "sharded").train[:], one.train)

    length, vocab = 64, one.tokenizer.vocab_size
    for step in range(20):  # some of the blocks cross a border: a shard has 500 tokens
        made = [make_batches(data, 1, 8, length, vocab, length_key="k").batch(step).tokens for data in (one, sharded)]
        assert np.array_equal(*made) and made[0].dtype == made[1].dtype
    for some in zip(*(validation_blocks(data, length, 99, length_key="k") for data in (one, sharded)), strict=True):
        assert np.array_equal(some[0].tokens, some[1].tokens)
    for some in zip(blocks([one.val], length), blocks([sharded.val], length), strict=True):
        assert np.array_equal(some[0].tokens, some[1].tokens)


def test_a_block_that_crosses_borders_is_read_right() -> None:
    whole = np.arange(1000, dtype=np.uint16)
    sharded = ShardedTokens(np.split(whole, range(7, 1000, 7)))  # shorter than a block: it crosses several
    one, many = (Batches(tokens, 3, 4, 20, 1000) for tokens in (whole, sharded))
    for step in range(30):
        assert np.array_equal(one.batch(step).tokens, many.batch(step).tokens)


def test_conversations_are_packed_alike_whatever_the_shards_are() -> None:
    chats = [to_words([np.arange(n, dtype=np.uint32), np.arange(n, 2 * n, dtype=np.uint32)]) for n in range(3, 30)]
    words = np.concatenate(chats)
    one, many = (
        pack_rows(tokens, 40, "training", "k") for tokens in (words, ShardedTokens(np.split(words, range(9, 800, 9))))
    )
    assert len(one) == len(many)
    for i in range(len(one)):
        assert all(np.array_equal(a, b) for a, b in zip(one.row(i), many.row(i), strict=True))


@pytest.mark.usefixtures("small_shards")
def test_a_flipped_byte_in_any_shard_is_caught_and_a_missing_one(tmp_path: Path) -> None:
    config = make_config(tmp_path, 4)  # not so many that only some are compared
    files = [shard["file"] for split in ("train", "val") for shard in prepare(config).meta[f"{split}_shards"]]
    for file in files:
        path = tmp_path / "tokens" / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for opening in (lambda: prepare(config), lambda: open_token_data(tmp_path / "tokens")):
            with pytest.raises(UserError, match=rf"{file} is damaged: it is not what was written"):
                opening()
        path.unlink()
        with pytest.raises(UserError, match=rf"{file} is missing, one of the token files"):
            prepare(config)
        path.write_bytes(content)
    assert len(files) > 8 and len(prepare(config).train)
    for name in ("train_00001.bin", "train_00002.bin"):  # the right bytes in the wrong order
        (tmp_path / "tokens" / name).rename(tmp_path / "tokens" / f"{name}.old")
    (tmp_path / "tokens" / "train_00001.bin.old").rename(tmp_path / "tokens" / "train_00002.bin")
    (tmp_path / "tokens" / "train_00002.bin.old").rename(tmp_path / "tokens" / "train_00001.bin")
    with pytest.raises(UserError, match="train_00001.bin is damaged"):
        prepare(config)


def test_more_files_than_may_be_open_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    prepare(config)
    opening = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "val_00000.bin":
            raise OSError(errno.EMFILE, "Too many open files")
        return opening(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"val_00000.bin cannot be opened: Too many open files.*ulimit -n"):
        prepare(config)


@pytest.mark.usefixtures("small_shards")
def test_fewer_new_shards_leave_none_of_the_old(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    before = len(prepare(config).meta["train_shards"])
    for i in range(7):
        (tmp_path / "texts" / f"{i}.jsonl").unlink()
    after = len(prepare(config).meta["train_shards"])
    assert 0 < after < before
    assert len(list((tmp_path / "tokens").glob("train*.bin"))) == after


def to_version_2(directory: Path, settings: str) -> None:
    """Turn a token directory into what jgpt wrote before it had shards."""
    meta = json.loads((directory / "meta.json").read_text())
    meta |= {"format_version": 2, "settings_sha256": settings}
    for split in ("train", "val"):
        [shard] = meta.pop(f"{split}_shards")
        (directory / shard["file"]).rename(directory / f"{split}.bin")
        meta |= {f"{split}_sha256": shard["sha256"], f"{split}_chunks_sha256": shard["chunks_sha256"]}
        meta["chunk_bytes"] = shard["chunk_bytes"]
    del meta["meta_sha256"]
    write_token_meta(directory, meta)


def test_tokens_of_an_earlier_version_are_read_and_not_made_again(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first = prepare(config)
    # As version 2 hashed data.text_field, val_fraction, encoding, encoding_errors; tokenizer.kind and its options.
    settings = hashlib.sha256(b'[2, ["text", 0.1, "utf-8", "strict"], "char", []]').hexdigest()
    to_version_2(token_directory(config), settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("[!.]*.*")}
    again = prepare(config)
    assert np.array_equal(again.train, first.train) and np.array_equal(again.val, first.val)
    assert again.meta["train_sha256"] == first.meta["train_sha256"]  # by which a run knows its text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("[!.]*.*")} == before
    content = bytearray((tmp_path / "tokens" / "val.bin").read_bytes())
    content[7] ^= 1
    (tmp_path / "tokens" / "val.bin").write_bytes(content)
    with pytest.raises(UserError, match="val.bin is damaged: it is not what was written"):
        prepare(config)
    (tmp_path / "texts" / "new.txt").write_text("more")
    prepare(config)
    assert not (tmp_path / "tokens" / "train.bin").exists()


def test_which_document_is_held_out_follows_from_its_file_and_its_place_there(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for path in sorted((tmp_path / "texts").iterdir()):
        path.unlink()
    for file in range(3):
        lines = "\n".join(json.dumps({"text": f"{file}-{i}"}) for i in range(25))
        (tmp_path / "texts" / f"{file}.jsonl").write_text(lines)
    data = prepare(config)
    expected = [f"{file}-{i}" for file in range(3) for i in range(25) if (file + i) % 10 == 9]
    assert data.tokenizer.decode(data.val).split("<|endoftext|>")[:-1] == expected
