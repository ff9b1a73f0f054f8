"""The command that makes token files: what it says, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from jgpt.data.token_files import open_token_data


def refused(result, *parts: str) -> None:
    assert result.code == 2, result.err
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


def state(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("[!.]*") if path.is_file()
    }


def test_it_says_what_it_made_and_makes_it_once(command, tiny, tmp_path):
    directory = tmp_path / "run" / "tokens"
    first = command("prepare", *tiny)
    assert first.code == 0 and first.err == ""
    assert f"token directory   {directory}" in first.out
    assert "documents         1 (0.0 MB of text)" in first.out
    assert "tokens            1,161 train, 129 validation (split by position)" in first.out
    assert re.search(r"vocabulary +\d+ ids \(char\), stored as uint16", first.out)
    assert "begins with\n    0 times 0 is 0, says the table.\n" in first.out
    data = open_token_data(directory)
    assert (len(data.train), len(data.val)) == (1161, 129)
    before = state(directory)
    again = command("prepare", *tiny)
    assert "up to date" in again.out and state(directory) == before
    (tmp_path / "text.txt").write_text("other text " * 99)
    assert "up to date" not in command("prepare", *tiny).out
    assert state(directory) != before


def test_it_says_what_is_learned_of_conversations(command, tiny, tmp_path):
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4, the table says."}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    paths = f"--config.data.text_glob={tmp_path}/chat.jsonl", f"--config.tokenizer.chat_template={tmp_path}/chat.jinja"
    result = command("prepare", *tiny, "--config.data.format=chat", *paths)
    assert result.code == 0 and result.err == ""
    assert "conversations     20 (0.0 MB of answers)" in result.out
    assert "learned           380 tokens, 73% of all" in result.out
    assert "tokens            468 train, 52 validation (split by conversation)" in result.out
    assert "begins with\n    2 + 2?\n    4, the table says.\n" in result.out
    refused(command("prepare", *tiny, "--config.data.format=chat"), "matches only files that are not .jsonl (.txt)")
    refused(command("prepare", *tiny, "--config.data.format=chat", paths[0]), "needs a chat template")


def test_cache_dir(command, tiny, tmp_path):
    assert command("prepare", *tiny, f"--config.data.cache_dir={tmp_path}/cache").code == 0
    assert (tmp_path / "cache" / "meta.json").is_file() and not (tmp_path / "run").exists()
    (tmp_path / "taken").write_text("mine")
    result = command("prepare", *tiny, f"--config.data.cache_dir={tmp_path}/taken")
    refused(result, f"the token directory {tmp_path}/taken cannot be written", "set data.cache_dir to")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_text_is_prepared_in_shards(command, tiny, tmp_path):
    (tmp_path / "more.txt").write_text("7 times 8 is 56, says the table.\n" * 40)
    arguments = [*tiny, f"--config.data.text_glob={tmp_path}/*.txt"]
    for bad in ("2/2", "1", "a/b", ""):
        refused(
            command("prepare", *arguments, f"--shard={bad}"), f"--shard={bad}: it must be INDEX/NUMBER", "Allowed: 0"
        )
    first = command("prepare", *arguments, "--shard=1/2")
    assert first.code == 0 and "shard             1/2 is complete, others are not yet" in first.out
    assert "1 of 2 are not yet: 0/2" in first.out
    for name in ("train", "prepare"):
        refused(command(name, *arguments), "prepared in 2 shards", "missing: 0/2", "--shard=0/2", "delete")
    refused(command("prepare", *arguments, "--shard=0/3"), "they are 2 parts, and --shard says 3")
    last = command("prepare", *arguments, "--shard=0/2")
    assert last.code == 0 and "2 shards are joined in" in last.out and "documents         2 " in last.out
    together = open_token_data(tmp_path / "run" / "tokens")
    assert "up to date" in command("prepare", *arguments).out
    assert command("prepare", *arguments, f"--config.data.cache_dir={tmp_path}/one").code == 0
    alone = open_token_data(tmp_path / "one")
    assert together.train[:].tobytes() == alone.train[:].tobytes() and together.meta["train_sha256"]
    assert together.val[:].tobytes() == alone.val[:].tobytes()


def test_text_that_is_not_utf8_is_named_or_replaced(command, tiny, tmp_path):
    (tmp_path / "more.txt").write_bytes(b"caf\xe9, caf\xe9\n" * 50)
    glob = f"--config.data.text_glob={tmp_path}/*.txt"
    assert command("prepare", *tiny).code == 0
    before = state(tmp_path / "run" / "tokens")
    refused(command("prepare", *tiny, glob), f"{tmp_path}/more.txt is not UTF-8: byte 0xe9 at byte offset 3", "replace")
    assert state(tmp_path / "run" / "tokens") == before
    refused(command("prepare", *tiny, glob, "--config.data.encoding_errors=replace"), "100 of 550 char", "replace_any")
    assert command("prepare", *tiny, glob, "--config.data.encoding=cp1252").code == 0
    assert "é" in (tmp_path / "run" / "tokens" / "tokenizer" / "tokenizer.json").read_text()
    result = command("prepare", *tiny, glob, "--config.data.encoding_errors=replace_any")
    assert result.code == 0 and "100 characters replaced" in result.out
    assert json.loads((tmp_path / "run" / "tokens" / "meta.json").read_text())["replaced_characters"] == 100


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", "", ["hold no text", "Set data.text_glob to"]),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', ["a.jsonl, line 2", "'body'", "Set data.text_field to"]),
        ("b.jsonl", "not json\n", ["b.jsonl, line 1 is not JSON"]),
        ("c.txt.gz", "not compressed", ["c.txt.gz cannot be read"]),
        ("d.pdf", "%PDF-1.7", ["d.pdf is not text: it is a PDF", "pdftotext"]),
    ],
)
def test_text_that_cannot_be_used(command, tiny, tmp_path, name, content, parts):
    (tmp_path / name).write_text(content)
    refused(command("prepare", *tiny, f"--config.data.text_glob={tmp_path / name}"), *parts)
    assert not (tmp_path / "run" / "tokens" / "meta.json").exists()


def test_an_impossible_config_is_refused_before_any_work(command, tiny, tmp_path):
    refused(
        command("prepare", *tiny, "--config.seed=-1", "--config.execution.remat=blok"),
        "these 2 problems",
        "'block'",
        "seed=-1",
    )
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_there(command, tiny, tmp_path):
    arguments = ["--config.tokenizer.kind=hf", f"--config.tokenizer.pretrained={tmp_path}/nothing"]
    refused(command("prepare", *tiny, *arguments), f"{tmp_path}/nothing")
