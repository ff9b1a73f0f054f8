"""Files to documents: what is read is exact, bounded, and every bad file has one clear answer."""

import bz2
import gzip
import io
import json
import lzma
import random
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from jgpt.data import corpus as corpus_module
from jgpt.data import decompress
from jgpt.data.corpus import Corpus
from jgpt.data.pieces import PIECE_CHARACTERS, cut
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
    corpus = Corpus([path], encoding_errors="replace_any")
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
    with pytest.raises(UserError, match="line 1 has no text in the field 'n': it has 1 there"):
        documents(Corpus([path], text_field="n"))


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


def test_null_is_left_out_and_counted_in_both_kinds_of_files(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = ["one", None, "two 🙂", None, ""]
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
    kinds += [pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []
    tables = [tmp_path / f"{i}.parquet" for i in range(len(kinds))]
    for path, kind in zip(tables, kinds, strict=True):
        parquet.write_table(pyarrow.table({"text": pyarrow.array(rows).cast(kind)}), path)
    for path in (lines, *tables):
        corpus = Corpus([path])
        assert documents(corpus) == ["one", "two 🙂"]
        assert corpus.nulls == 2 and corpus.remarks() == ", 2 rows without text (null) left out"
    with pytest.raises(UserError, match="line 1 has no text in the field 'missing'"):  # null is a value, nothing is not
        documents(Corpus([lines], text_field="missing"))


def test_long_lines_cost_in_proportion_and_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 400_000
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}) + "\n" + json.dumps({"text": "next"}))
    joined = 0

    class Counted(str):
        def __add__(self, other: str) -> str:
            nonlocal joined
            joined += len(self) + len(other)
            return Counted(str.__add__(self, other))

    blocks = [Counted("x" * 1000)] * 1000
    assert [len(line) for line in corpus_module._lines(blocks, path)] == [1_000_000] and joined == 0
    assert documents(Corpus([path])) == [text, "next"]
    monkeypatch.setattr(corpus_module, "LINE_CHARACTERS", 1_000_000)
    with pytest.raises(UserError, match=r"a.jsonl, line 1 is longer than 1,000,000 characters. A line must fit"):
        documents(Corpus([path]))
    array = write(tmp_path / "b.jsonl", json.dumps([{"text": text}] * 2))
    with pytest.raises(UserError, match=r"line 1 is longer .*JSON array, convert it: jq -c '\.\[\]' .*b.jsonl >"):
        documents(Corpus([array]))


@pytest.mark.parametrize(
    "text", ['[{"text": "a"},\n{"text": "b"}]', '[{"text": "a"}, {"text": "b"}]', '[\n{"text": 1}]']
)
def test_a_json_array_is_named_as_one(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"a.jsonl, line 1 .*If the file is one JSON array, convert it: jq -c"):
        documents(Corpus([write(tmp_path / "a.jsonl", text)]))


def test_files_with_a_wrong_suffix_or_line_ends_are_named_with_the_command(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt.gz", "plain text")
    with pytest.raises(UserError, match=r"does not begin as a .gz file does. .* run: mv .*a.txt.gz .*a.txt$"):
        documents(Corpus([plain]))
    with pytest.raises(UserError, match=r"carriage return alone. Convert it: tr '\\r' '\\n' < .*a.jsonl >"):
        documents(Corpus([write(tmp_path / "a.jsonl", '{"text": "a"}\r{"text": "b"}\r')]))


def test_what_decompresses_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress, "ONCE_PAST", 1 << 20)
    monkeypatch.setattr(decompress, "MOST_TIMES", 100)
    bombs = [write(tmp_path / "a.txt.gz", gzip.compress(b"x" * 20_000_000))]
    if sys.version_info < (3, 14):
        zstandard = pytest.importorskip("zstandard")
        bombs.append(write(tmp_path / "a.txt.zst", zstandard.compress(b"x" * 200_000_000)))
    for path in bombs:
        tracemalloc.start()
        with pytest.raises(UserError, match=rf"{path.name} is .* becomes over 0.0 GB.*and 100 times is the limit"):
            documents(Corpus([path]))
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
        tracemalloc.stop()


ENCODED = {
    "gb18030": "今天天气很好，我们一起去公园散步。他说：你好世界！\n",
    "big5": "今天天氣很好，我們一起去公園散步。他說：你好世界！\n",
    "shift_jis": "今日はとても良い天気なので、公園へ散歩に行きましょう。\n",
    "euc_jp": "今日はとても良い天気なので、公園へ散歩に行きましょう。\n",
    "euc_kr": "오늘은 날씨가 매우 좋아서 우리는 공원에 갔다.\n",
    "cp1251": "Сегодня хорошая погода, и мы пошли в Парк.\n",
    "koi8-r": "Сегодня хорошая погода, и мы пошли в Парк.\n",
    "cp1252": "Le café était fermé – où êtes-vous allés ?\n",
    "utf-16": "Hello there\n",
    "utf-16-le": "Hello there\n",
    "utf-16-be": "Hello there\n",
    "utf-32": "Hello there\n",
    "utf-32-be": "Hello there\n",
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_another_encoding_is_named_with_the_key_that_reads_it(tmp_path: Path, encoding: str) -> None:
    texts, data = [ENCODED[encoding] * 50], (ENCODED[encoding] * 50).encode(encoding)
    plain, packed = write(tmp_path / "a.txt", data), write(tmp_path / "b.txt.gz", gzip.compress(data))
    text = ENCODED[encoding].rstrip()
    record = write(tmp_path / "c.jsonl", "".join(f'{{"text": "{text}"}}\r\n' for _ in range(9)).encode(encoding))
    for file in (plain, packed, record):
        with pytest.raises(UserError, match=rf"is not UTF-8: .*[Ss]et data.encoding='{encoding}' to read it"):
            documents(Corpus([file]))
    with pytest.raises(UserError, match=rf"iconv -f {encoding.replace('_', '-')} -t utf-8 .*a.txt > .*a.utf8.txt"):
        documents(Corpus([plain]))
    expected = texts * 2 + [text] * 9
    assert documents(Corpus([plain, packed, record], encoding=encoding)) == expected
    replacing = Corpus([plain, packed, record], encoding=encoding, encoding_errors="replace")
    assert documents(replacing) == expected and replacing.replaced == 0


def test_one_encoding_for_files_of_another_is_refused(tmp_path: Path) -> None:
    utf8, ascii = write(tmp_path / "a.txt", ENCODED["gb18030"]), write(tmp_path / "b.txt", "plain English")
    for encoding in ("gb18030", "cp1252", "utf-16-le"):
        with pytest.raises(UserError, match=rf"a.txt is not in data.encoding='{encoding}': it is UTF-8"):
            documents(Corpus([utf8], encoding=encoding))
    assert documents(Corpus([ascii], encoding="gb18030")) == ["plain English"]
    with pytest.raises(UserError, match="b.txt is not in data.encoding='utf-16': it is UTF-8"):
        documents(Corpus([ascii], encoding="utf-16"))
    wide = write(tmp_path / "c.txt", "plain English".encode("utf-16-be"))
    with pytest.raises(UserError, match="c.txt is not in data.encoding='utf-16-le': it is utf-16-be"):
        documents(Corpus([wide], encoding="utf-16-le"))
    broken = write(tmp_path / "d.txt", ("好" * 300_000).encode("gb18030") + b"\xff!")
    with pytest.raises(UserError, match=r"d.txt is not in data.encoding='gb18030': byte 0xff at byte offset 600000 "):
        documents(Corpus([broken], encoding="gb18030"))


def tar_of(data: bytes) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(data))
        return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "lfs.txt": (POINTER, "a git-lfs pointer, not the file that it stands for. Run: cd .* && git lfs pull"),
    "lfs.parquet": (POINTER, "a git-lfs pointer"),
    "lfs.txt.gz": (POINTER, "a git-lfs pointer"),
    "a.txt": (gzip.compress(b"text"), "compressed by gzip. Run: mv .*a.txt .*a.txt.gz"),
    "it's.txt": (b"\x28\xb5\x2f\xfd" + bytes(9), "compressed by zstd. Run: mv '.*s.txt'"),
    "b.txt": (b"PK\x03\x04" + bytes(9), r"a zip archive .*Run: unzip .*b.txt -d .*b.txt.unpacked"),
    "c.jsonl": (b"PAR1\x15" + bytes(9), "a Parquet file. Run: mv .*c.jsonl .*c.jsonl.parquet"),
    "d.txt": (b"%PDF-1.7 text", "a PDF. Run: pdftotext .*d.txt"),
    "e.txt": (tar_of(b"text"), "a tar archive. Run: tar -xf .*e.txt"),
    "f.txt.gz": (gzip.compress(tar_of(b"text")), "what it holds is a tar archive"),
    "g.txt.gz": (gzip.compress(b"PK\x03\x04"), "what it holds is a zip archive"),
    "h.txt": (b"\x7fELF" + bytes(500) + b"a" * 600, "500 of its first 1,104 bytes are NUL"),
    "i.txt": (b"BZh91AY&SY" + bytes(9), "compressed by bzip2"),
}


def test_files_that_are_no_text_are_named_with_the_command_that_helps(tmp_path: Path) -> None:
    for name, (data, message) in OTHERS.items():
        path = write(tmp_path / name, data)
        with pytest.raises(UserError, match=f"{name} is not text: .*{message}"):
            documents(Corpus([path]))
    fine = write(tmp_path / "fine.txt", b"BZh is no archive, \x00 is one NUL among others, PAR1 a word")
    assert documents(Corpus([fine])) != []


def test_all_bad_files_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "a.txt", "fine")
    late = write(tmp_path / "b.txt", b"x" * 600_000 + b"\xff")
    line = write(tmp_path / "c.jsonl", '{"text": "a"}\n{"text": ')
    archive, table = write(tmp_path / "d.txt", b"PK\x03\x04"), write(tmp_path / "e.parquet", b"PAR1")
    files = [good, late, line, archive, table]
    with pytest.raises(UserError) as error:
        documents(Corpus(files))
    assert str(error.value).startswith("4 files of data.text_glob cannot be used:\n  - ")
    for name in ("b.txt is not UTF-8: byte 0xff at byte offset 600000", "c.jsonl, line 2", "d.txt is not", "e.parquet"):
        assert str(error.value).count(name) == 1
    monkeypatch.setattr(corpus_module, "MOST_BYTES_AFTER", 1)
    with pytest.raises(UserError, match=r"(?s)^2 files .*b.txt is.*c.jsonl.*- 1 files after these were not looked at"):
        documents(Corpus([late, line, table]))


def test_replacing_more_than_one_percent_of_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"a" * 980 + b"\xff" * 20)
    fine = write(tmp_path / "b.txt", b"a" * 9990 + b"\xff" * 10)
    with pytest.raises(UserError, match=r"a.txt: 20 of 1,000 characters are not UTF-8.*up to 1%.*'replace_any'"):
        documents(Corpus([path, fine], encoding_errors="replace"))
    for files, errors, n in (([fine], "replace", 10), ([path, fine], "replace_any", 30)):
        corpus = Corpus(files, encoding_errors=errors)
        assert sum(text.count("\ufffd") for text in documents(corpus)) == corpus.replaced == n
        assert corpus.remarks() == f", {n} characters replaced"


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
    bad.append(write(tmp_path / "a.txt.bz2", damage(bz2.compress(text.encode()))))
    bad.append(write(tmp_path / "a.txt.xz", damage(lzma.compress(text.encode()))))
    for path in bad:
        with pytest.raises(UserError, match=rf"{path.name} cannot be read: .*Replace this one"):
            documents(Corpus([path]))


def test_other_compressions_are_read_by_suffixes_in_any_case(tmp_path: Path) -> None:
    text = random_text(4, 30_000)
    parts = text[:10_000].encode(), text[10_000:].encode()
    for name, compress in (("A.TXT.GZ", gzip.compress), ("a.md.bz2", bz2.compress), ("a.TXT.xz", lzma.compress)):
        assert documents(Corpus([write(tmp_path / name, b"".join(map(compress, parts)))])) == [text]
    lines = write(tmp_path / "a.NDJSON.Bz2", bz2.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert documents(Corpus([lines])) == ["a", "b"]


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
    path = write(tmp_path / "a.txt", "a")
    with pytest.raises(UserError, match=r"2 files .*\n  - .*b.txt cannot be read: .*\n  - .*c.txt cannot be read: "):
        documents(Corpus([path, tmp_path / "b.txt", tmp_path / "c.txt"]))
    pieces = Corpus([path]).pieces()
    next(pieces)
    path.unlink()
    with pytest.raises(UserError, match="a.txt cannot be read"):
        list(pieces)
