"""Text at addresses: it gives the tokens of the same text on this disk; what does not work is said."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_shards import make_config

from jgpt.config.check import problems
from jgpt.data.config_text import find_text
from jgpt.data.corpus import Corpus
from jgpt.data.find_files import find_files
from jgpt.data.write_tokens import prepare
from jgpt.errors import UserError

URL = "memory://bucket/texts"
pytestmark = pytest.mark.usefixtures("memory")


def names(text_glob: str, format: str = "text") -> list[str]:
    return [str(file).rpartition("/")[2] for file in find_files(text_glob, format)]


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_remote_text_gives_the_tokens_of_local_text(tmp_path: Path, memory: MemoryFileSystem, protocol: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    config = make_config(tmp_path, 5)
    texts = tmp_path / "texts"
    (texts / "packed.txt.gz").write_bytes(gzip.compress(("naïve text " * 500).encode()))
    parquet.write_table(pyarrow.table({"text": ["a row", None, "漢字 " * 9]}), texts / "table.parquet")
    local = prepare(config)
    memory.put(f"{texts}/", "/bucket/texts/", recursive=True)
    config.data.text_glob = URL if protocol == "memory" else f"file://{texts}"
    config.data.cache_dir = str(tmp_path / "remote")
    remote = prepare(config)
    assert local.tokenizer.sha256 == remote.tokenizer.sha256 and remote.meta["n_files"] == 18
    assert np.array_equal(remote.train[:], local.train[:]) and np.array_equal(remote.val[:], local.val[:])


def test_tokens_are_made_again_when_remote_text_changes_and_serve_when_it_is_gone(
    tmp_path: Path, memory: MemoryFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, 5)
    memory.put(f"{tmp_path}/texts/", "/bucket/texts/", recursive=True)
    config.data.text_glob = f"{URL}/*.jsonl"
    first = prepare(config).meta
    assert prepare(config).meta == first
    content = memory.cat("/bucket/texts/3.jsonl")
    memory.pipe("/bucket/texts/3.jsonl", content.replace(b"the", b"eht"))  # as long as before
    second = prepare(config).meta
    assert second["fingerprint"] != first["fingerprint"] and second["train_shards"] != first["train_shards"]
    memory.rm("/bucket", recursive=True)
    assert find_text(config) == [] and prepare(config).meta == second
    assert "Training continues from the tokens in" in caplog.text


def test_globs_folders_and_names_are_taken(tmp_path: Path, memory: MemoryFileSystem) -> None:
    for name in ("b.txt", "a.jsonl.gz", "deep/c.md", "deep/.hidden.txt", ".d/e.txt", "table.csv", "data", "f.c"):
        memory.pipe(f"/bucket/texts/{name}", b"text")
    (tmp_path / "local.txt").write_text("local")
    assert names(URL) == ["a.jsonl.gz", "b.txt", "c.md"]
    assert names(f"{URL}/*") == ["a.jsonl.gz", "b.txt"]
    assert names(f"{URL}/**/*.md") == ["c.md"] and names(f"{URL}/*.csv") == ["table.csv"]
    assert names(f"{URL}/data") == ["data"] and names(f"{URL}/b.txt, {URL}/*.txt") == ["b.txt"]
    assert names(URL, "chat") == ["a.jsonl.gz"]
    assert names("memory://bucket") == ["a.jsonl.gz", "b.txt", "c.md"]
    assert names(f"{URL}/b.txt,{tmp_path}/*.txt") == ["local.txt", "b.txt"]
    (tmp_path / "c").mkdir()
    memory.pipe("/c/main.c", b"int")
    with pytest.raises(UserError, match=r"'memory://c' matches only files that are not text \(.c\)"):
        find_files("memory://c")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"{URL}/*.txt", "'memory://bucket/texts/.*' matches no file"),
        ("nosuch://bucket/a.txt", "'nosuch://bucket/a.txt' cannot be listed: ValueError: Protocol not known"),
        ("memory://", "'memory://' matches no file"),
    ],
)
def test_what_cannot_be_listed_is_said(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_files(address)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    with pytest.raises(UserError, match=r"'gs://bucket/\*.txt' needs a package: .*gcsfs.* pip"):
        find_files("gs://bucket/*.txt")


def test_a_service_that_fails_while_a_file_is_read_is_named(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/bucket/texts/a.txt", b"text")
    files = find_files(URL)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the token has expired\nmore lines")

    monkeypatch.setattr(MemoryFileSystem, "open", refuse)
    with pytest.raises(UserError, match="a.txt cannot be read: RuntimeError: the token has expired. Make it readable"):
        list(Corpus(files).pieces())


def test_what_is_wrong_in_a_remote_file_is_named(memory: MemoryFileSystem) -> None:
    memory.pipe("/bucket/texts/a.jsonl", json.dumps({"text": "a"}).encode() + b"\nno")
    with pytest.raises(UserError, match=r"memory://.*/a.jsonl, line 2 is not JSON"):
        list(Corpus(find_files(URL)).pieces())
    memory.pipe("/bucket/texts/a.jsonl", b"%PDF-1.7")
    with pytest.raises(UserError, match=r"memory://.*/a.jsonl is not text: it is a PDF"):
        list(Corpus(find_files(URL)).pieces())


def test_runs_and_tokens_are_on_this_machine(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert not problems(config)
    config.out_dir, config.data.cache_dir = "gs://bucket/run", "s3://bucket/tokens"
    found = problems(config)
    assert len(found) == 2 and all("must be a folder of this machine" in problem for problem in found)
