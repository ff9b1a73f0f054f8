"""Open the token files `train.bin` and `val.bin` as memmaps, and check them.

In the data path: between `write_tokens.py`, which writes them, and `batches.py`. The files are plain arrays of ids.
Where meta.json has "format": "chat", they are arrays of the words of `conversations.py`: ids with two marks in the high
bits. A token directory is complete when it has a meta.json, which is removed first and written last.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jgpt.config.files import user_path
from jgpt.data.conversations import IDS
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenData:
    """An open token directory."""

    train: np.ndarray  # [n], ids or words: uint16 or uint32
    val: np.ndarray  # [n], the same
    meta: dict[str, Any]  # meta.json
    tokenizer: Tokenizer  # that made the ids

    @property
    def is_chat(self) -> bool:
        """Whether the tokens are words of conversations, of which only answers are learned."""
        return self.meta.get("format") == "chat"

    def ids(self, words: np.ndarray) -> np.ndarray:
        """Return the ids in a part of `train` or `val`, without marks."""
        return words & IDS if self.is_chat else words

    @property
    def val_targets(self) -> int:
        """The number of tokens in meta's `val_bytes` of text: all, or of conversations those that are learned."""
        return self.meta["val_targets" if self.is_chat else "val_tokens"]


def token_directory(config: ConfigDict) -> Path:
    """Return the directory of a config's token files: data.cache_dir, or tokens/ in the run directory."""
    return user_path(config.data.cache_dir or f"{config.out_dir}/tokens").absolute()


def open_token_data(directory: Path) -> TokenData:
    """Open a token directory; raise UserError when it is incomplete, damaged, or of another version of jgpt."""
    meta = read_token_meta(directory)
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory} holds no complete token files: meta.json is missing, unreadable or of another version "
            f"(needed: {FORMAT_VERSION}). Run python -m jgpt.prepare, or set data.cache_dir to another directory."
        )
    tokenizer = load_tokenizer(directory / "tokenizer")
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise UserError(
            f"{directory / 'tokenizer'} is not the tokenizer that made the token files beside it. They must belong "
            f"together. Delete {directory}; the next run makes a new one."
        )
    train, val = (_open_tokens(directory, split, meta) for split in ("train", "val"))
    return TokenData(train, val, meta, tokenizer)


def _open_tokens(directory: Path, split: str, meta: dict[str, Any]) -> np.ndarray:
    path, dtype, n_tokens = directory / f"{split}.bin", np.dtype(meta["dtype"]), meta[f"{split}_tokens"]
    n_bytes = path.stat().st_size if path.exists() else 0
    if n_bytes != n_tokens * dtype.itemsize:
        raise UserError(
            f"{path} is damaged: it has {n_bytes:,} bytes, and {n_tokens * dtype.itemsize:,} are expected "
            f"({n_tokens:,} tokens of {dtype}). Delete {directory}; the next run makes a new one."
        )
    if n_tokens == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    tokens = np.memmap(path, dtype, mode="r")
    # Check all of a small file. Of a large one check 16 parts, evenly spread, 64 MB in all, so that opening is quick.
    n_places, n_each = 16, (1 << 22) // dtype.itemsize
    starts = range(0, n_tokens, n_each) if n_tokens <= n_places * n_each else range(0, n_tokens, n_tokens // n_places)
    mask = IDS if meta.get("format") == "chat" else np.iinfo(dtype).max
    highest = max(int((tokens[start : start + n_each] & mask).max()) for start in starts)
    if highest >= meta["vocab_size"]:
        raise UserError(
            f"{path} is damaged: it holds the id {highest}, and the vocabulary ends at {meta['vocab_size'] - 1}. "
            f"Delete {directory}; the next run makes a new one."
        )
    return tokens


def read_token_meta(directory: Path) -> dict[str, Any]:
    """Return the content of a token directory's meta.json; {} where it cannot be read."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
