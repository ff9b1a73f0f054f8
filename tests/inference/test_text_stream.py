"""Text in pieces: together they are the decoded whole, and none ends inside a character."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jgpt.data.tokenizer import Tokenizer, train_bpe, train_char
from jgpt.inference.text_stream import BROKEN, TextStream

TEXT = "Zażółć 5€, 日本語 and 👩‍👩‍👧 and\n naïve\ttabs,   spaces."


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    """Make a vocabulary like Llama 2's: words behind a low line, and a token for each byte."""
    words = ["<unk>", "</s>", "▁", "▁a", "a", "b", "▁the", "。", "語", ",", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    backend = Backend(model)
    backend.decoder = decoder  # type: ignore[assignment]
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend.to_str(), {"eos_token": "</s>"})


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: train_bpe([TEXT], 260),
    "llama": lambda: sentencepiece(LLAMA),
    "metaspace": lambda: sentencepiece(METASPACE),
    "char": lambda: train_char([TEXT]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_whatever_the_ids_are(kind: str):
    """Random ids, most of them no valid UTF-8, in parts of random lengths, behind a random beginning."""
    tokenizer, rng = KINDS[kind](), np.random.default_rng(0)
    for _ in range(300):
        # Few bytes, so that characters come about as well: those of the euro sign and a letter.
        some = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x82, 0xAC, 0x41)]
        ids = rng.integers(0, tokenizer.vocab_size, 40)
        ids = np.where(rng.random(40) < 0.5, rng.choice([i or 0 for i in some], 40), ids).tolist()
        start = int(rng.integers(0, 9))
        stream, pieces = TextStream(tokenizer, ids[:start]), []
        cuts = sorted(rng.integers(start, 41, 12).tolist())
        for begin, end in zip([start, *cuts], [*cuts, 40], strict=True):
            pieces.append(stream.add(ids[begin:end]))
        assert not any(piece.endswith(BROKEN) for piece in pieces)
        before = tokenizer.decode(ids[:start])
        whole = tokenizer.decode(ids)
        assert "".join(pieces) + stream.close() == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
def test_real_text_token_by_token(kind: str):
    tokenizer = KINDS[kind]()
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.add([i]) for i in ids]
    assert "".join([*pieces, stream.close()]) == tokenizer.decode(ids)
    assert BROKEN not in "".join(pieces)
    assert sum(map(bool, pieces)) > 5, json.dumps(pieces)  # it does come in pieces


def test_what_stays_broken_comes_at_the_end():
    tokenizer = KINDS["bytes"]()
    ids = tokenizer.encode("a€").tolist()[:-1]
    stream = TextStream(tokenizer)
    assert (stream.add(ids), stream.close()) == ("", "a" + BROKEN)
    stream = TextStream(tokenizer)
    assert [stream.add([i]) for i in ids] + [stream.close()] == ["a", *[""] * (len(ids) - 1), BROKEN]


def test_nothing_is_nothing():
    stream = TextStream(KINDS["bytes"]())
    assert stream.add([]) == stream.close() == ""
