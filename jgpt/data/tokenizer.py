"""Turn text into ids and back.

One class for the three kinds (char, bpe, hf), over the file format of the `tokenizers` library: the saved directory
opens in `transformers.AutoTokenizer` and gives the same ids there. In the data path: after `corpus.py`, before
`write_tokens.py`. `make_tokenizer.py` makes the one of a config; `published.py` opens those of others.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jgpt.atomic_write import write_file, write_json
from jgpt.data.encodings import without_surrogates
from jgpt.data.first_bytes import why_unusable
from jgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
EMBEDDING_ROWS = "embedding_rows"  # our key in tokenizer_config.json: ids from there on have no row in the model
MIN_BPE_VOCABULARY = 257  # all bytes and the end-of-text token
# How bpe cuts text into words: as GPT-2 does, but at 512 characters. No word of a language is as long, and text without
# spaces would be one word. Learning takes time that grows with the square of a word's length.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = GPT2_WORDS.replace("+", "{1,512}")


class Tokenizer:
    """A vocabulary and its rules, kept as the text of a tokenizer.json, whose hash identifies the tokenizer.

    Where a document holds the text of a special token, it becomes that token, as in AutoTokenizer.
    """

    def __init__(self, tokenizer_json: str, settings: dict[str, Any]):
        """Open the text of a tokenizer.json; `settings` are those of tokenizer_config.json.

        They have at least `eos_token`, and for a chat model `chat_template`, see `chat_template.py`.
        """
        self.tokenizer_json = tokenizer_json
        self.settings = settings
        self.backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        self.backend.no_truncation()
        self.backend.no_padding()
        # The ids that it puts before a text, such as Llama's <s>; `encode` does not add them.
        start = self.backend.encode("").ids
        self.backend.post_processor = None  # it adds special tokens, which nobody here wants, and trims offsets
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        # The number of ids, though a vocabulary may skip some; without those that the model has no row for.
        self.vocab_size: int = min(max(vocabulary.values()) + 1, settings.get(EMBEDDING_ROWS, 2**32))
        self.eot_id: int = vocabulary[settings["eos_token"]]
        self.start_ids = [i for i in start if i != self.eot_id]
        self.sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self._character_ids = _character_ids(tokenizer_json, vocabulary)
        self._specials = re.compile(f"({re.escape(UNKNOWN)}|{re.escape(END_OF_TEXT)})")

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint32 [n]; no special tokens are added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of many texts, each uint32 [n], encoded on all cores."""
        if self._character_ids is not None:
            return [self._encode_characters(text) for text in texts]
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # Rust has no lone surrogates; they come from a terminal's prompt, never from a corpus
            texts = [without_surrogates(text) for text in texts]
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._ids(encoding) for encoding in encodings]

    def encode_parts(self, texts: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """Return the ids of each part of many texts, uint32; the parts' ids together are those of the whole text.

        Where a token would cross the border of two parts, the parts of that text are encoded separately.
        """
        if self._character_ids is not None:
            return [self.encode_batch(parts) for parts in texts]
        # Parts encoded separately differ from the whole text: Llama 2's tokenizer puts a space before each.
        ids_of_parts = []
        encodings = self.backend.encode_batch(["".join(parts) for parts in texts], add_special_tokens=False)
        for parts, encoding in zip(texts, encodings, strict=True):
            cuts = _tokens_at(encoding, list(accumulate(map(len, parts[:-1]))))
            ids = self._ids(encoding)
            ids_of_parts.append(self.encode_batch(parts) if cuts is None else np.split(ids, cuts))
        return ids_of_parts

    def _ids(self, encoding: tokenizers.Encoding) -> np.ndarray:
        """Return the ids of a text; raise UserError where the model has no row for one."""
        ids = np.array(encoding.ids, np.uint32)
        if EMBEDDING_ROWS in self.settings and (beyond := ids[ids >= self.vocab_size]).size:
            raise UserError(
                f"the text holds {self.backend.id_to_token(int(beyond[0]))!r}, a token that was added to the tokenizer,"
                f" and the model's embedding has no row for it: it ends at {self.vocab_size - 1}. Allowed: texts"
                " without it. Remove it from the text or the chat template, or take a model that was resized."
            )
        return ids

    def _encode_characters(self, text: str) -> np.ndarray:
        """Encode with one table of all characters: about fifty times faster than a general tokenizer."""
        assert self._character_ids is not None
        ids = []
        for part in self._specials.split(text) if UNKNOWN in text or END_OF_TEXT in text else [text]:
            if part in (UNKNOWN, END_OF_TEXT):
                ids.append(np.array([self.backend.token_to_id(part)], np.uint32))
            else:
                ids.append(self._character_ids[_code_points(part)])
        return np.concatenate(ids)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids, with special tokens as text."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: Path, context_length: int) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained(directory)` opens."""
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            **self.settings,
            "tokenizer_class": "PreTrainedTokenizerFast",  # a name that both transformers 4 and 5 know
            "clean_up_tokenization_spaces": False,  # else decoding is not exact
            "model_max_length": context_length,
        }
        write_json(directory / "tokenizer_config.json", settings)
        write_file(directory / "tokenizer.json", self.tokenizer_json)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open a directory that `Tokenizer.save` wrote; raise UserError when it is damaged."""
    try:
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        with (directory / "tokenizer.json").open(encoding="utf-8", newline="") as file:
            return Tokenizer(file.read(), settings)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{directory} holds no complete tokenizer ({type(error).__name__}: {error}). It must have tokenizer.json "
            "and tokenizer_config.json as a run wrote them. Restore them, or delete the directory that holds them."
            + what_files_are(directory)
        ) from error


def train_char(texts: Iterable[str]) -> Tokenizer:
    """Make a tokenizer whose ids are the sorted characters of some texts, then <unk> and <|endoftext|>.

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
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenizer (Radford et al. 2019).

    Every byte has an id, so any text is encoded and decoded exactly. A small corpus gives fewer ids than `vocab_size`.
    The saved tokenizer.json cuts text by `WORDS` as well, so that ids are the same everywhere. Raises UserError when
    `vocab_size` is too small for the bytes.
    """
    if vocab_size < MIN_BPE_VOCABULARY:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}. bpe needs at least {MIN_BPE_VOCABULARY}: 256 bytes and "
            f"{END_OF_TEXT}. Set it to 4096, or higher for a large corpus."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True), {"eos_token": END_OF_TEXT})


def what_files_are(directory: Path) -> str:
    """Name the files of a tokenizer's directory that are something else, such as git-lfs pointers; "" without one."""
    files = (directory / name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return "".join(f" {file}:{reason}" for file in files if (reason := why_unusable(file)))


def _tokens_at(encoding: tokenizers.Encoding, places: Sequence[int]) -> list[int] | None:
    """Find the tokens that begin at these characters; None when no token begins at one of them."""
    tokens = []
    for place in places:
        token = encoding.char_to_token(place)
        characters = None if token is None else encoding.token_to_chars(token)
        if token is None or characters is None or characters[0] != place:
            return None
        tokens.append(token)
    return tokens


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _character_ids(tokenizer_json: str, vocabulary: dict[str, int]) -> np.ndarray | None:
    """Return the id of every code point, uint32, for a tokenizer of kind char; None for any other."""
    model = json.loads(tokenizer_json)["model"]
    if model.get("merges") != [] or model.get("unk_token") != UNKNOWN or END_OF_TEXT not in vocabulary:
        return None
    if any(len(token) > 1 for token in vocabulary.keys() - {UNKNOWN, END_OF_TEXT}):
        return None
    ids = np.full(0x110000, vocabulary[UNKNOWN], np.uint32)
    for token in vocabulary.keys() - {UNKNOWN, END_OF_TEXT}:
        ids[ord(token)] = vocabulary[token]
    return ids
