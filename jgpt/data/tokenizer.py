"""Text to ids and back.

One class for the three kinds (char, bpe, hf) over the `tokenizers` library's own file format: the saved directory
opens in `transformers.AutoTokenizer` and gives the same ids there. Before in the data path:
`corpus.py`; after: `write_tokens.py`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, trainers

from jgpt.atomic_write import write_file
from jgpt.data.corpus import Corpus, without_surrogates
from jgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
MIN_BPE_VOCABULARY = 257  # all bytes and the end-of-text token


class Tokenizer:
    """A vocabulary and its rules, held as the text of a tokenizer.json: the file is the identity, whoever reads it.

    Literal text of a special token inside a document becomes that token, as AutoTokenizer has it.
    """

    def __init__(self, tokenizer_json: str, settings: dict[str, Any]):
        """Open the text of tokenizer.json; `settings` are tokenizer_config.json's: at least `eos_token`.

        `chat_template` among them is what `chat_template.py` turns messages into text by.
        """
        self.tokenizer_json = tokenizer_json
        self.settings = settings
        self.backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        # What it puts before a text, as Llama's <s>; `encode` does not.
        start = self.backend.encode("").ids
        self.backend.post_processor = None  # it adds special tokens, which is never asked for, and trims offsets
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # as many as the ids, though a vocabulary may leave some out
        self.eot_id: int = vocabulary[settings["eos_token"]]
        self.start_ids = [i for i in start if i != self.eot_id]
        self.sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self._character_ids = _character_ids(tokenizer_json, vocabulary)
        self._specials = re.compile(f"({re.escape(UNKNOWN)}|{re.escape(END_OF_TEXT)})")

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint32; nothing is added at its ends."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of many texts, on all cores."""
        if self._character_ids is not None:
            return [self._encode_characters(text) for text in texts]
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # Rust holds no lone surrogates; they come from a terminal's prompt, never from a corpus
            texts = [without_surrogates(text) for text in texts]
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_parts(self, texts: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """Return the ids of many texts that come in parts, each part's own; together they are the whole text's ids.

        Where a token would reach over a border, the parts of that text are encoded by themselves.
        """
        if self._character_ids is not None:
            return [self.encode_batch(parts) for parts in texts]
        # Parts by themselves would be no text that the model has seen: Llama 2's tokenizer puts a space before each.
        found = []
        encodings = self.backend.encode_batch(["".join(parts) for parts in texts], add_special_tokens=False)
        for parts, encoding in zip(texts, encodings, strict=True):
            cuts = _tokens_at(encoding, list(accumulate(map(len, parts[:-1]))))
            ids = np.array(encoding.ids, np.uint32)
            found.append(self.encode_batch(parts) if cuts is None else np.split(ids, cuts))
        return found

    def _encode_characters(self, text: str) -> np.ndarray:
        """Look every character up in one table: some fifty times faster than a general tokenizer."""
        assert self._character_ids is not None
        ids = []
        for part in self._specials.split(text) if UNKNOWN in text or END_OF_TEXT in text else [text]:
            if part in (UNKNOWN, END_OF_TEXT):
                ids.append(np.array([self.backend.token_to_id(part)], np.uint32))
            else:
                ids.append(self._character_ids[_code_points(part)])
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids, special tokens spelled out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: Path, context_length: int) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained(directory)` opens."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            **self.settings,
            "tokenizer_class": "PreTrainedTokenizerFast",  # the one name that transformers 4 and 5 both take
            "clean_up_tokenization_spaces": False,  # else decoding is not exact
            "model_max_length": context_length,
        }
        write_file(directory / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        write_file(directory / "tokenizer.json", self.tokenizer_json)


def make_tokenizer(options: ConfigDict, corpus: Corpus) -> Tokenizer:
    """Train or load the tokenizer that config.tokenizer asks for; char reads the corpus once, bpe too."""
    if options.kind == "hf":
        return load_pretrained(options.pretrained)
    if options.kind == "char":
        return train_char(piece.text for piece in corpus.pieces("characters"))
    return train_bpe(_spread(corpus, options.training_megabytes * 1e6), options.vocab_size)


def _spread(corpus: Corpus, budget: float) -> Iterator[str]:
    """Pick `budget` characters of text spread evenly over a corpus, whether it is compressed or not."""
    taken, share = 0, budget / max(corpus.n_bytes, 1)
    for piece in corpus.pieces("tokenizer"):
        if taken <= corpus.bytes_read * share:
            taken += len(piece.text)
            yield piece.text


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open what `Tokenizer.save` wrote; raise UserError when it is not whole."""
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        with (directory / "tokenizer.json").open(encoding="utf-8", newline="") as file:
            return Tokenizer(file.read(), settings)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{directory} holds no whole tokenizer ({type(error).__name__}: {error}). It needs tokenizer.json and "
            "tokenizer_config.json as a run wrote them. Restore them, or delete the directory that holds them."
        ) from error


def train_char(texts: Iterable[str]) -> Tokenizer:
    """Make a tokenizer whose ids are the sorted characters of some texts, then unknown and end of text.

    >>> char = train_char(["hello"])
    >>> char.encode("hello").tolist(), char.decode(char.encode("hole?"))
    ([1, 0, 2, 2, 3], 'hole<unk>')
    """
    seen = np.zeros(0x110000, bool)
    for text in texts:
        seen[_code_points(text)] = True
    seen[0xD800:0xE000] = False  # halves of surrogate pairs are no characters
    tokens = [*(chr(code) for code in np.flatnonzero(seen)), UNKNOWN, END_OF_TEXT]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in (UNKNOWN, END_OF_TEXT)])
    return Tokenizer(backend.to_str(pretty=True), {"eos_token": END_OF_TEXT, "unk_token": UNKNOWN})


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with GPT-2's pre-tokenizer (Radford et al. 2019).

    Every byte has an id, so that any text makes the round trip exactly. Little text gives fewer ids than `vocab_size`.
    """
    if vocab_size < MIN_BPE_VOCABULARY:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}. bpe needs at least {MIN_BPE_VOCABULARY}: 256 bytes and "
            f"{END_OF_TEXT}. Pass --config.tokenizer.vocab_size=4096, or more for much text."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True), {"eos_token": END_OF_TEXT})


def load_pretrained(name: str) -> Tokenizer:
    """Open any fast tokenizer through transformers: a directory (offline), or a name on the Hugging Face Hub."""
    directory = os.path.expanduser(name)
    if not name or (not os.path.isdir(directory) and name.startswith((".", "/", "~"))):
        raise UserError(
            f"tokenizer.pretrained is {name!r}, which is no directory. kind=hf needs a local tokenizer directory, or a "
            "name on the Hugging Face Hub. Pass --config.tokenizer.pretrained=gpt2, say."
        )
    os.environ.setdefault("USE_TF", "0")  # TensorFlow in the process breaks NCCL
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news here
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_directory = os.path.isdir(directory)
    try:
        found = AutoTokenizer.from_pretrained(
            directory if is_directory else name, local_files_only=is_directory, trust_remote_code=False
        )
    except Exception as error:  # transformers and the Hub raise whatever they like
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer.pretrained: {name!r} does not open in transformers ({type(error).__name__}: {reason}). Needed "
            "is a directory with tokenizer.json, or the name of a public model, which needs internet. Check the name, "
            "or download it and pass the directory. Tokenizers that bring their own code are never run."
        ) from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer.pretrained: {name!r} is a {type(found).__name__}, which has no tokenizer.json. "
            "A fast tokenizer is needed. Choose another, such as gpt2."
        )
    settings: dict[str, Any] = {key: str(token) for key, token in found.special_tokens_map.items() if str(token)}
    template = found.chat_template  # from tokenizer_config.json, or chat_template.jinja beside it
    if isinstance(template, dict):  # several, by name; the others are for tools and retrieval
        template = template.get("default")
    if template:
        settings["chat_template"] = template
    if "eos_token" not in settings:
        raise UserError(
            f"tokenizer.pretrained: {name!r} has no eos_token, which must end every document. Choose another, "
            "or name its end-of-text token as eos_token in the directory's tokenizer_config.json."
        )
    return Tokenizer(found.backend_tokenizer.to_str(pretty=True), settings)


def _tokens_at(encoding: tokenizers.Encoding, places: Sequence[int]) -> list[int] | None:
    """Find the tokens that begin at these places, counted in characters; None when at one of them there is none."""
    found = []
    for place in places:
        token = encoding.char_to_token(place)
        characters = None if token is None else encoding.token_to_chars(token)
        if token is None or characters is None or characters[0] != place:
            return None
        found.append(token)
    return found


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _character_ids(tokenizer_json: str, vocabulary: dict[str, int]) -> np.ndarray | None:
    """Return the id of every code point when that is all there is to this tokenizer (kind char), else None."""
    model = json.loads(tokenizer_json)["model"]
    if model.get("merges") != [] or model.get("unk_token") != UNKNOWN or END_OF_TEXT not in vocabulary:
        return None
    if any(len(token) > 1 for token in vocabulary.keys() - {UNKNOWN, END_OF_TEXT}):
        return None
    ids = np.full(0x110000, vocabulary[UNKNOWN], np.uint32)
    for token in vocabulary.keys() - {UNKNOWN, END_OF_TEXT}:
        ids[ord(token)] = vocabulary[token]
    return ids
