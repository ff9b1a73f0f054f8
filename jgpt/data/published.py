"""What the files beside a pretrained tokenizer say of it: the token that ends a text, the model's rows.

In the data path: `tokenizer.py` asks when it opens the tokenizer of others.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

log = logging.getLogger("jgpt")

LIKELY_ENDS = ("<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "[EOS]", "[SEP]")
ROWS = "embedding_rows"  # our key in tokenizer_config.json


def end_token(directory: Path, backend: tokenizers.Tokenizer) -> str | None:
    """Return the token that ends a text, as the model's own files say; None where they do not."""
    for name in ("generation_config.json", "config.json"):
        found = _read(directory / name)
        ids = found.get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if type(i) is int and 0 <= i < 2**32 and (token := backend.id_to_token(i)) is not None:
                log.info("tokenizer: its end-of-text token is %s, as %s says", token, directory / name)
                return token
    return None


def likely_end(backend: tokenizers.Tokenizer) -> str:
    """Return the token of a vocabulary that most likely ends a text; "" without one."""
    return next((token for token in LIKELY_ENDS if backend.token_to_id(token) is not None), "")


def rows_for(directory: Path, backend: tokenizers.Tokenizer) -> int | None:
    """Return the rows of the model beside a tokenizer, where tokens were added that have none; None elsewhere.

    Many fine-tuning recipes add a [PAD] that no text holds, and leave the embedding as it is.
    """
    found = _read(directory / "config.json")
    n_rows = found.get("vocab_size")
    if type(n_rows) is not int:
        return None
    beyond = {token: i for token, i in backend.get_vocab(with_added_tokens=True).items() if i >= n_rows}
    added = backend.get_added_tokens_decoder()
    if not beyond or not all(i in added for i in beyond.values()):
        return None
    log.warning(
        "tokenizer: the model's embedding has %d rows, and none for %s, which were added later: a text that holds one"
        " is refused", n_rows, ", ".join(sorted(beyond)[:10]),
    )  # fmt: skip
    return n_rows


def missing_packages(directory: Path) -> str:
    """Name the packages that a directory with a SentencePiece model alone needs, as far as they are not installed."""
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not path.is_file():
        return ""
    with path.open("rb") as file:
        if file.read(1) != b"\n":  # how a SentencePiece model begins; a tiktoken file begins with text
            return ""
    return " ".join(name for name, module in _NEEDED.items() if not _is_installed(module))


_NEEDED = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} where there is none: whoever opens the model names what is wrong with its files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
