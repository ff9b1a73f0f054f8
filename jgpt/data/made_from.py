"""What token files are made from: the text and the settings that they depend on, and whether those are still the same.

In the data path: `write_tokens.py` asks before it makes any, and writes the hashes into meta.json.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jgpt.data.conversations import ChatCorpus
from jgpt.data.corpus import Corpus
from jgpt.data.remote import TextFile
from jgpt.data.token_directory import FORMAT_VERSION, TOKENS_VERSION
from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError


def difference_of(meta: dict[str, Any], config: ConfigDict, corpus: Corpus, given: Tokenizer | None) -> str:
    """Say in what a meta.json differs from a config; "" where it serves.

    Text that is gone, a corpus without files, is not compared.
    """
    if meta.get("format_version") != FORMAT_VERSION:
        return "they are of another version of jgpt"
    if meta["settings_sha256"] != settings_hash(config):
        return "they were made with other settings of data or tokenizer"
    if corpus.files and meta["fingerprint"] != fingerprint(config, corpus.files):
        return "the text has changed"
    # Tokens of a resumed run's tokenizer belong to that run only, even when the text is the same.
    if meta["tokenizer_sha256"] != given.sha256 if given else meta["tokenizer_given"]:
        return "they were made with another tokenizer"
    template = corpus.template if isinstance(corpus, ChatCorpus) else ""
    if template and meta["template_sha256"] != sha256(template):
        return "they were made with another chat template"
    return ""


def fingerprint(config: ConfigDict, files: Sequence[TextFile]) -> str:
    """Hash what the token files depend on: path, size and time of each source file, and the config's values."""
    try:
        sources = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:  # deleted since it was found, while this process waited for another
        raise UserError(
            f"{error.filename} cannot be read: {error.strerror}. Put it back, or leave it out of data.text_glob."
        ) from None
    return sha256(json.dumps([settings_hash(config), sources]))  # ASCII: a name that is not UTF-8 has no bytes


def settings_hash(config: ConfigDict) -> str:
    """Hash the config's values that the token files depend on."""
    values = list(setting_values(config).values())
    data, kind, options = values[:4], values[4], values[5:]
    if config.data.format == "chat":  # the template itself is compared by its own hash
        data += ["chat", bool(config.tokenizer.chat_template)]
    return sha256(json.dumps([TOKENS_VERSION, data, kind, options]))


def setting_values(config: ConfigDict) -> dict[str, Any]:
    """Return the keys of a config that the token files depend on, with their values."""
    kind, data = config.tokenizer.kind, ("text_field", "val_fraction", "encoding", "encoding_errors")
    options = {"char": (), "bpe": ("vocab_size", "training_megabytes"), "hf": ("pretrained",)}[kind]
    return (
        {f"data.{key}": config.data[key] for key in data}
        | {"tokenizer.kind": kind}
        | {f"tokenizer.{key}": config.tokenizer[key] for key in options}
    )


def sha256(text: str) -> str:
    """Hash a text."""
    return hashlib.sha256(text.encode()).hexdigest()
