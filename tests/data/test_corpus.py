"""Files to documents: what is read is exact, bounded, and every bad file has one clear answer."""

import gzip
import json
import random
import sys
import tracemalloc
from pathlib import Path

import pytest

from jgpt.data.corpus import PIECE_CHARACTERS, Corpus, cut
from jgpt.data.find_files import find_files
from jgpt.errors import UserError


def documents(corpus: Corpus) -> list[str]:
    """Join the pieces of each document."""
    texts, parts = [], []
    for piece in corpus.pieces():
        assert len(piece.text) <= PIECE_CHARACTERS
        parts.append(piece.text)
        if piece.ends_document:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def random_text(seed: int, n: int) -> str:
    """Return n characters from all of Unicode, many of them newlines and spaces."""
    rng = random.Random(seed)
    planes = ["\n", "\r\n", "\r", " ", "\t", "\u2028", "\x85", "\x00", "a", "Z", "é", "漢", "🙂", "\u0301", "\ufffd"]
    anything = [chr(code) for code in (rng.randrange(0x110000) for _ in range(n // 4)) if not 0xD800 <= code < 0xE000]
    return "".join(rng.choices(planes + anything[:100], k=n)) + "".join(anything)


def test_find_files_takes_globs_directories_and_lists(tmp_path: Path) -> None:
    a, b = write(tmp_path / "x/a.txt", "a"), write(tmp_path / "x/y/b.md.gz", gzip.compress(b"b"))
    odd, _ = write(tmp_path / "odd [1].py", "c"), write(tmp_path / "x/notes.csv", "no")
    assert find_files(str(tmp_path / "x")) == [a, b]
    assert find_files(f"{tmp_path}/x/*, {tmp_path}/x/**/*.gz,{a}") == [a, b]
    assert find_files(str(odd)) == [odd]


def test_find_files_says_what_is_wrong(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "1,2")
    with pytest.raises(UserError, match=r"nothing.* matches no file \(current folder.*\.parquet.*Set data.text_glob"):
        find_files(f"{tmp_path}/nothing*.txt")
    for part in (str(table), f"{tmp_path}/*", str(tmp_path)):
        with pytest.raises(UserError, match=r"only files that are not text \(\.csv\)"):
            find_files(part)
    with pytest.raises(UserError, match="text_glob is empty"):
        find_files(" , ")


def test_text_is_exact_and_pieces_are_whole(tmp_path: Path) -> None:
    text = random_text(1, 3 * PIECE_CHARACTERS)
    corpus = Corpus([write(tmp_path / "a.txt", text), write(tmp_path / "b.txt", ""), write(tmp_path / "c.md", "end")])
    assert documents(corpus) == [text, "end"]
    assert corpus.bytes_read == corpus.n_bytes
    pieces = [piece.text for piece in corpus.pieces()]
    assert not any(a.endswith("\r") and b.startswith("\n") for a, b in zip(pieces, pieces[1:], strict=False))


@pytest.mark.parametrize("text", ["x" * 700_000, "\r\n" * 400_000, "\n" * 600_000, " " * 600_000, "é" * 600_000])
def test_text_without_words_is_cut_too(tmp_path: Path, text: str) -> None:
    assert documents(Corpus([write(tmp_path / "a.txt", text)])) == [text]
    assert [p.ends_document for p in cut([text])].count(True) == 1


def test_pieces_end_at_a_word(tmp_path: Path) -> None:
    pieces = list(cut(["one two\r\nthree; four\n" * 50_000]))
    assert len(pieces) > 3
    assert all(piece.text[-1].isalnum() for piece in pieces[:-1])
    assert all(piece.text[0] in "\r\n" for piece in pieces[1:])


def test_a_byte_order_mark_is_dropped_at_the_start_only(tmp_path: Path) -> None:
    assert documents(Corpus([write(tmp_path / "a.txt", "\ufeffa\ufeffb")])) == ["a\ufeffb"]
    assert documents(Corpus([write(tmp_path / "a.jsonl", '\ufeff{"text": "\ufeffa"}')])) == ["\ufeffa"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("w") as file:
        for _ in range(300):
            file.write("some words and a number 12345\n" * 3500)  # 100 kB each
    tracemalloc.start()
    n = sum(len(piece.text) for piece in Corpus([path]).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == path.stat().st_size > 30_000_000
    assert peak < 8_000_000


@pytest.mark.parametrize("start", [0, 5, 262_143, 262_144, 524_287])
def test_what_is_not_utf8_is_named_by_its_offset_or_replaced(tmp_path: Path, start: int) -> None:
    data = b"a" * start + b"\xe9\xef\xbf\xbd" + b"b" * 10 + b"\xf0\x9f"
    path = write(tmp_path / "latin.txt", data)
    with pytest.raises(UserError, match=rf"latin.txt is not UTF-8: byte 0xe9 at byte offset {start} .*='replace'"):
        documents(Corpus([path]))
    corpus = Corpus([path], encoding_errors="replace")
    assert documents(corpus) == [data.decode("utf-8", "replace")]
    assert corpus.replaced == 2  # and the U+FFFD that was there is none


def test_the_offset_counts_decompressed_bytes_and_whole_files(tmp_path: Path) -> None:
    bad = b"a" * 600_000 + b"\xff"
    with pytest.raises(UserError, match="byte offset 600000 "):
        documents(Corpus([write(tmp_path / "a.txt.gz", gzip.compress(bad))]))
    with pytest.raises(UserError, match=r"a.jsonl, line 2 is not UTF-8: .* byte offset 24 "):
        documents(Corpus([write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}')]))


def test_jsonl(tmp_path: Path) -> None:
    texts = ["one", "two\nlines \u2028 🙂", "x" * 700_000, "", "last"]
    lines = "\r\n".join(json.dumps({"body": text, "n": 1}) for text in texts)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress((lines + "\n\n").encode()))
    assert documents(Corpus([path], text_field="body")) == [text for text in texts if text]
    with pytest.raises(UserError, match=r"line 1 has no text in the field 'text': it has the fields \['body', 'n'\]"):
        documents(Corpus([path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 1}', "line 2 has no text in the field 'text'"),
        ('"text"', "line 2 has no text in the field 'text': it is 'text'"),
        ('{"text": ', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"text": "\\ud83d"}', r"line 2 holds half a surrogate pair \(U\+D83D\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        documents(Corpus([write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n{line}\n')]))


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a\\ud83d \\ud83d\\ude42"}')
    corpus = Corpus([path], encoding_errors="replace")
    assert documents(corpus) == ["a\ufffd 🙂"] and corpus.replaced == 1


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:20], lambda data: b"no" + data])
def test_a_damaged_archive_is_named(tmp_path: Path, damage) -> None:
    text = random_text(2, 10_000)
    bad = [write(tmp_path / "a.txt.gz", damage(gzip.compress(text.encode())))]
    if sys.version_info < (3, 14):
        zstandard = pytest.importorskip("zstandard")
        bad.append(write(tmp_path / "a.txt.zst", damage(zstandard.compress(text.encode()))))
    for path in bad:
        with pytest.raises(UserError, match=rf"{path.name} cannot be read: .*Replace this one"):
            documents(Corpus([path]))


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python has its own zstd")
def test_zstd_of_several_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = random_text(3, 300_000)
    frames = zstandard.compress(text.encode()) + zstandard.compress(b"more")
    path = write(tmp_path / "a.md.zst", frames)
    assert documents(Corpus([path])) == [text + "more"]
    assert documents(Corpus([write(tmp_path / "e.txt.zst", b"")])) == []
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        documents(Corpus([path]))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = ["one", None, "", "two 🙂"] * 300
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(1200))}), path)
    corpus = Corpus([path])
    assert documents(corpus) == [text for text in texts if text]
    assert corpus.bytes_read == corpus.n_bytes
    for field in ("n", "missing"):
        with pytest.raises(UserError, match=rf"column '{field}': it has text \(string\), n \(int64\).*data.text_field"):
            documents(Corpus([path], text_field=field))
    with pytest.raises(UserError, match="b.parquet cannot be read: "):
        documents(Corpus([write(tmp_path / "b.parquet", path.read_bytes()[:-20])]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        documents(Corpus([path]))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.txt"
    path.symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"gone.txt"):
        find_files(str(path))
    fifo = write(tmp_path / "a.txt", "a")
    corpus = Corpus([fifo])
    pieces = corpus.pieces()
    next(pieces)
    fifo.unlink()
    with pytest.raises(UserError, match="a.txt cannot be read"):
        list(pieces)
