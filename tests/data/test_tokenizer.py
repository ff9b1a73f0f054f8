"""Ids and text: round trips, and the same ids in transformers.AutoTokenizer, for every kind."""

import importlib.util
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jgpt.data import make_tokenizer as make_module
from jgpt.data.corpus import Corpus
from jgpt.data.make_tokenizer import _sample
from jgpt.data.published import load_pretrained
from jgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_char
from jgpt.errors import UserError

CORPUS = [
    "def main():\n    return 'hello world'  # naïve\r\n\n",
    "The quick brown fox, 12345 times! 漢字 🙂\t<unk>\n",
] * 20


def nasty(seed: int, n: int = 400) -> str:
    rng = random.Random(seed)
    text = "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(n))
    parts = [
        *text,
        "<|endoftext|>",
        "<unk>",
        "<s>",
        "\r\n",
        "   ",
        "\x00",
        " hello",
        "'s",
        "🙂",
        "e\u0301",
        "\n\n",
        "▁",
    ]
    return "".join(rng.choices(parts, k=n)) + "".join(rng.choices(parts[-12:], k=n))


TEXTS = ["", " ", "\n", "hello world", " hello  world \n", "<unk>", "a<|endoftext|>b", *map(nasty, range(5))]


def pretrained_like(directory: Path, family: str) -> Path:
    """Save a small tokenizer set up as GPT-2's or Llama 2's is."""
    if family == "gpt2":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
        special, alphabet = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 99}
    else:
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(prepend)  # type: ignore[assignment]
        spell = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(spell)  # type: ignore[assignment]
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], []
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings["chat_template"] = "{{ messages[0]['content'] }}"
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    saved = json.loads(backend.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    if family == "llama":  # as a tokenizer that begins every text by itself
        begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        specials = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        pair = [*begin, {"Sequence": {"id": "B", "type_id": 1}}]
        saved["post_processor"] = {
            "type": "TemplateProcessing",
            "single": begin,
            "pair": pair,
            "special_tokens": specials,
        }
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(params=["char", "bpe", "gpt2", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "char":
        return train_char([*CORPUS, "".join(nasty(0))])
    if request.param == "bpe":
        return train_bpe(CORPUS, 400)
    return load_pretrained(str(pretrained_like(tmp_path / request.param, request.param)))


def test_auto_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "saved", context_length=77)
    auto = AutoTokenizer.from_pretrained(str(tmp_path / "saved"), local_files_only=True)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == auto.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == auto.decode(ids.tolist())
    assert auto.model_max_length == 77
    assert auto.eos_token_id == tokenizer.eot_id
    assert max(auto.get_vocab().values()) + 1 == tokenizer.vocab_size
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_parts_together_have_the_ids_of_the_text(tokenizer: Tokenizer) -> None:
    """The borders lie where a token begins anyway; then a part's ids are the text's, as inference has them."""
    texts = [
        [f"<user>\n{text}\n<assistant>\n", f"hello world, 12 🙂 {text}<|endoftext|>\n", "", "<user>\n"]
        for text in ("hello", "the quick  brown\n", "naïve 漢字 🙂")
    ]
    for parts, ids in zip(texts, tokenizer.encode_parts(texts), strict=True):
        assert len(ids) == len(parts) and all(part.dtype == np.uint32 for part in ids)
        assert tokenizer.decode(np.concatenate(ids)) == "".join(parts)
    for parts, ids in zip(texts, tokenizer.encode_parts([parts[:2] for parts in texts]), strict=True):
        assert np.concatenate(ids).tolist() == tokenizer.encode("".join(parts[:2])).tolist()
        assert ids[0].tolist() == tokenizer.encode(parts[0]).tolist()


def test_a_token_over_the_border_is_not_made() -> None:
    bpe = train_bpe(["\n\n\n ab" * 99], 300)
    assert len(bpe.encode("\n\n\n")) == 1
    ((prompt, answer),) = bpe.encode_parts([["ab\n", "\n\n ab"]])
    assert prompt.tolist() == bpe.encode("ab\n").tolist() and answer.tolist() == bpe.encode("\n\n ab").tolist()


def test_a_part_has_no_space_of_its_own(tmp_path: Path) -> None:
    """Llama 2's tokenizer puts one before a text, and would before every part."""
    llama = load_pretrained(str(pretrained_like(tmp_path / "llama", "llama")))
    ((_, answer),) = llama.encode_parts([["<user>\n", "hello"]])
    assert llama.backend.id_to_token(int(llama.encode("hello")[0])).startswith("▁")
    assert "".join(map(llama.backend.id_to_token, answer.tolist())) == "hello"


def test_chat_templates_of_a_file_and_of_several_names(tmp_path: Path) -> None:
    directory = pretrained_like(tmp_path / "llama", "llama")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for templates, expected in (
        ([{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}], "{{ 1 }}"),
        ([{"name": "tool_use", "template": "{{ 2 }}"}], None),
    ):
        settings["chat_template"] = templates
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_pretrained(str(directory)).settings.get("chat_template") == expected
    (directory / "chat_template.jinja").write_text("{{ 3 }}")
    assert load_pretrained(str(directory)).settings["chat_template"] == "{{ 3 }}"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_pretrained_ids_are_the_originals(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = pretrained_like(tmp_path / family, family)
    auto = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    ours = load_pretrained(str(directory))
    for text in TEXTS:
        assert ours.encode(text).tolist() == auto.encode(text, add_special_tokens=False)
    assert ours.eot_id == auto.eos_token_id
    assert ours.settings.get("chat_template") == auto.chat_template


def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a", 10)
    again = load_tokenizer(tmp_path / "a")
    assert (again.sha256, again.vocab_size, again.eot_id) == (tokenizer.sha256, tokenizer.vocab_size, tokenizer.eot_id)
    for text, ids in zip(TEXTS, again.encode_batch(TEXTS), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


def test_bpe_makes_the_round_trip_on_any_text() -> None:
    bpe = train_bpe(CORPUS, 300)
    for seed in range(50):
        text = nasty(seed)
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.eot_id]) == "<|endoftext|>"
    assert bpe.encode("<|endoftext|>").tolist() == [bpe.eot_id]


def test_bpe_is_deterministic_and_as_large_as_asked() -> None:
    assert train_bpe(CORPUS, 300).vocab_size == 300
    assert train_bpe(CORPUS, 300).sha256 == train_bpe(CORPUS, 300).sha256
    assert 257 < train_bpe(["ab ab"], 10_000).vocab_size < 300
    with pytest.raises(UserError, match="vocab_size is 256. bpe needs at least 257"):
        train_bpe(CORPUS, 256)


def test_long_words_are_cut_where_they_are_learned_and_where_they_are_encoded(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    dna = "".join(random.Random(0).choices("ACGT", k=200_000))
    bpe = train_bpe([dna, "漢字🙂" * 500, *CORPUS], 2000)
    assert bpe.vocab_size == 2000
    bpe.save(tmp_path, 77)
    auto = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in (dna[:5000], "x" * 511, "x" * 513, "漢" * 1000, "a🙂" * 400, f"{CORPUS[0]}{dna[:1025]} {CORPUS[1]}"):
        ids = bpe.encode(text)
        assert ids.tolist() == auto.encode(text, add_special_tokens=False)
        assert bpe.decode(ids) == text
    assert bpe.backend.pre_tokenizer is not None
    words = bpe.backend.pre_tokenizer.pre_tokenize_str(f"one two {dna}")
    assert [len(word) for word, _ in words[:4]] == [3, 4, 513, 512]  # with the space before it
    assert max(len(word) for word, _ in words[3:]) == 512
    # A word that is not long has the ids that it had without the bound.
    plain = tokenizers.Tokenizer.from_str(bpe.tokenizer_json)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    for text in [*CORPUS[:2], *map(nasty, range(3))]:
        assert plain.encode(text).ids == bpe.encode(text).tolist()


def test_text_whose_words_are_all_different_is_learned_from_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(make_module, "MOST_NEW", 40_000)
    rng = random.Random(0)
    for i in range(100):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" + "".join(rng.choices("ACGT", k=2000)))
    corpus = Corpus(sorted(tmp_path.iterdir()))
    chosen = [int(text[:2]) for text in _sample(corpus, 1e9)]
    assert 18 <= len(chosen) <= 22 and chosen[:10] == list(range(10)) and chosen[-1] >= 90
    assert "tokenizer: learned from 0.0 MB of text, because nearly all of its words are different" in caplog.text
    for i in range(100):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02} " + "the same words again and again " * 70)
    assert len(list(_sample(corpus, 1e9))) == 100


def test_char_ids_are_sorted_characters() -> None:
    char = train_char(["ba", "🙂\n", "\ud800"])
    assert char.vocab_size == 6 and char.eot_id == 5
    assert char.encode("\nab🙂").tolist() == [0, 1, 2, 3]
    assert char.encode("é<unk>z<|endoftext|>").tolist() == [4, 4, 4, 5]
    assert char.decode([1, 0, 2]) == "a\nb"
    text = "".join(set(nasty(3).replace("<", ""))) * 3
    assert (own := train_char([text])).decode(own.encode(text)) == text


def test_half_a_surrogate_pair_crashes_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size > tokenizer.encode("a\ud800b").max()
    assert tokenizer.encode("a\ud800b")[0] == tokenizer.encode("a")[0]


def test_char_is_fast() -> None:
    text = "To be, or not to be\n" * 100_000
    char = train_char([text])
    started = time.perf_counter()
    assert len(char.encode(text)) == len(text)
    assert len(text) / (time.perf_counter() - started) > 5e6  # characters a second; about 200e6 on an idle core


def test_pieces_of_a_document_have_the_ids_of_the_document(tmp_path: Path) -> None:
    bpe = train_bpe(CORPUS, 500)
    text = "".join(random.Random(0).choices(CORPUS, k=12_000))
    (tmp_path / "a.txt").write_text(text, newline="")
    pieces = [piece.text for piece in Corpus([tmp_path / "a.txt"]).pieces()]
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate(bpe.encode_batch(pieces)), bpe.encode(text))


def test_training_text_is_sample_over_the_corpus(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 500)
    corpus = Corpus(sorted(tmp_path.iterdir()))
    chosen = [int(text[:2]) for text in _sample(corpus, 10_000)]
    assert 10 <= len(chosen) <= 11 and max(np.diff(chosen)) <= 11 and chosen[-1] >= 89
    assert len(list(_sample(corpus, 1e9))) == 100


def test_bad_pretrained_names_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("", "./missing", str(tmp_path / "missing")):
        with pytest.raises(UserError, match="is not a directory.*Set tokenizer.pretrained"):
            load_pretrained(name)
    with pytest.raises(UserError, match="does not open in transformers"):
        load_pretrained(str(tmp_path))
    directory = pretrained_like(tmp_path / "gpt2", "gpt2")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="has no eos_token"):
        load_pretrained(str(directory))


def test_a_pointer_in_the_place_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    directory = pretrained_like(tmp_path / "gpt2", "gpt2")
    (directory / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    for opening in (lambda: load_pretrained(str(directory)), lambda: load_tokenizer(directory)):
        with pytest.raises(UserError, match=r"gpt2/tokenizer.json: It is a git-lfs pointer.*cd .*gpt2 && git lfs pull"):
            opening()


def test_the_models_own_files_name_the_token_that_ends_a_text(tmp_path: Path) -> None:
    directory = pretrained_like(tmp_path / "gpt2", "gpt2")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ids = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    (directory / "config.json").write_text(json.dumps({"eos_token_id": ids["a"]}))
    assert load_pretrained(str(directory)).settings["eos_token"] == "a"
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [10**9, ids["b"], ids["a"]]}))
    assert load_pretrained(str(directory)).eot_id == ids["b"]


def test_a_sentencepiece_model_alone_names_the_package_that_is_missing(tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(UserError, match="has a tokenizer.model and no tokenizer.json.*pip install .*sentencepiece"):
        load_pretrained(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # transformers 5.0 itself
def test_a_vocabulary_of_bert_needs_its_kind_and_an_end(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\n##s\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 7, "bos_token_id": 3, "eos_token_id": 3}'
    )
    with pytest.raises(UserError, match="BertTokenizer for a vocab.txt"):  # it opened, and every text was empty
        load_pretrained(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 7, "eos_token_id": null}')
    with pytest.raises(UserError, match='has no eos_token.*"eos_token": ".SEP."'):
        load_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 7, "eos_token_id": 3}')
    assert load_pretrained(str(tmp_path)).encode("hello hellos").tolist() == [5, 5, 6]


def test_a_saved_tokenizer_that_is_not_whole_is_answered(tmp_path: Path) -> None:
    train_char(["a"]).save(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match="holds no complete tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no complete tokenizer .FileNotFoundError"):
        load_tokenizer(tmp_path / "missing")
