"""Token files, `train.bin` and `val.bin`, opened as memmaps and checked.

In the data path: between `write_tokens.py`, which makes them, and `batches.py`. The files are plain arrays: of ids, or
where meta.json has "format": "chat", of the words of `conversations.py`, ids with two marks in their high bits. A token
directory is whole when its meta.json is there: that file is removed first and written last.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jgpt.data.conversations import IDS
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenData:
    """A token directory, open: 1-D memmaps, what meta.json says, and the tokenizer that made them."""

    train: np.ndarray  # ids, or of conversations words
    val: np.ndarray
    meta: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def is_chat(self) -> bool:
        """Tell conversations, of which the answers are learned, from plain text."""
        return self.meta.get("format") == "chat"

    def ids(self, words: np.ndarray) -> np.ndarray:
        """Return the ids of a part of `train` or `val`."""
        return words & IDS if self.is_chat else words

    @property
    def val_targets(self) -> int:
        """Tokens that stand for meta's `val_bytes` of text: all, or of conversations those that are learned."""
        return self.meta["val_targets" if self.is_chat else "val_tokens"]


def token_directory(config: ConfigDict) -> Path:
    """Return where a config's token files live: data.cache_dir, or tokens/ in the run directory."""
    return Path(config.data.cache_dir or f"{config.out_dir}/tokens").expanduser().absolute()


def open_token_data(directory: Path) -> TokenData:
    """Open a token directory; raise UserError when it is not whole or its ids are past the vocabulary."""
    meta = read_token_meta(directory)
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory} holds no whole token files: meta.json is missing, unreadable or of another version "
            f"(needed: {FORMAT_VERSION}). Run python -m jgpt.prepare, or name another data.cache_dir."
        )
    tokenizer = load_tokenizer(directory / "tokenizer")
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise UserError(
            f"{directory / 'tokenizer'} is not the tokenizer that made the token files beside it. They must be of one "
            f"piece. Delete {directory}; the next run makes it anew."
        )
    train, val = (_open_tokens(directory, split, meta) for split in ("train", "val"))
    return TokenData(train, val, meta, tokenizer)


def _open_tokens(directory: Path, split: str, meta: dict[str, Any]) -> np.ndarray:
    path, dtype, n_tokens = directory / f"{split}.bin", np.dtype(meta["dtype"]), meta[f"{split}_tokens"]
    found = path.stat().st_size if path.exists() else 0
    if found != n_tokens * dtype.itemsize:
        raise UserError(
            f"{path} is damaged: it has {found:,} bytes, and {n_tokens * dtype.itemsize:,} are expected "
            f"({n_tokens:,} tokens of {dtype}). Delete {directory}; the next run makes it anew."
        )
    if n_tokens == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    tokens = np.memmap(path, dtype, mode="r")
    # All of a small file; of a big one 16 places spread evenly, 64 MB in all, so that opening takes no time.
    n_places, n_each = 16, (1 << 22) // dtype.itemsize
    starts = range(0, n_tokens, n_each) if n_tokens <= n_places * n_each else range(0, n_tokens, n_tokens // n_places)
    mask = IDS if meta.get("format") == "chat" else np.iinfo(dtype).max
    highest = max(int((tokens[start : start + n_each] & mask).max()) for start in starts)
    if highest >= meta["vocab_size"]:
        raise UserError(
            f"{path} is damaged: it holds the id {highest}, and the vocabulary ends at {meta['vocab_size'] - 1}. "
            f"Delete {directory}; the next run makes it anew."
        )
    return tokens


def read_token_meta(directory: Path) -> dict[str, Any]:
    """Return what meta.json of a token directory says; {} where it cannot be read."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
