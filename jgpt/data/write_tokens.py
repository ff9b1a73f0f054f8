"""Tokenize documents and write the token files.

In the data path: after `corpus.py` and `tokenizer.py`; before `token_files.py`, which opens the files.
"""

import errno
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from jgpt.atomic_write import atomic_file, remove_leftovers, write_file
from jgpt.data.chat_template import read_template
from jgpt.data.conversations import ChatCorpus, write_conversations
from jgpt.data.corpus import Corpus, batched_by_characters
from jgpt.data.find_files import find_files
from jgpt.data.token_files import FORMAT_VERSION, TokenData, open_token_data, read_token_meta, token_directory
from jgpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from jgpt.errors import UserError

FILES = ("meta.json", "train.bin", "val.bin")  # meta.json is removed first and written last
CHUNK_BYTES = 1 << 24
log = logging.getLogger("jgpt")


def prepare(config: ConfigDict, tokenizer_dir: Path | None = None, files: list[Path] | None = None) -> TokenData:
    """Return the tokens of a config's text; tokenize it unless the token directory is up to date.

    `tokenizer_dir` holds the tokenizer of a resumed run; without it, the config's own is trained or loaded. `files` are
    what `find_files` found for the config, where the caller has them already. Raises UserError on bad text, on a disk
    that is full or cannot be written, and on damaged token files.
    """
    directory = token_directory(config)
    given = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    corpus = _open_corpus(config, given, files)
    template = corpus.template if isinstance(corpus, ChatCorpus) else ""
    fingerprint = _fingerprint(config, corpus.files)
    meta = read_token_meta(directory)
    # Tokens of a resumed run's tokenizer belong to that run only, even when the text is the same.
    same_tokenizer = meta.get("tokenizer_sha256") == given.sha256 if given else not meta.get("tokenizer_given")
    same_template = not template or meta.get("template_sha256") == _sha256(template)
    if meta.get("fingerprint") == fingerprint and same_tokenizer and same_template:
        data = open_token_data(directory)
        log.info("tokens: %s tokens in %s are up to date", f"{len(data.train) + len(data.val):,}", directory)
        return data
    with _storage(directory):
        _check_directory(directory, corpus)
        tokenizer = given or make_tokenizer(config.tokenizer, corpus)
        if isinstance(corpus, ChatCorpus):
            corpus.template = tokenizer.settings["chat_template"] = _chat_template(config, tokenizer)
            corpus.settings = tokenizer.settings
        for name in FILES:  # only now that the tokenizer is there: a wrong name for it must not cost the old files
            (directory / name).unlink(missing_ok=True)
        tokenizer.save(directory / "tokenizer", config.model.context_length)
        meta = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "tokenizer_kind": config.tokenizer.kind,
            "tokenizer_given": given is not None,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
        } | _write_tokens(directory, corpus, tokenizer, config.data.val_fraction)
        write_file(directory / "meta.json", json.dumps(meta, indent=2) + "\n")
    return open_token_data(directory)


def _open_corpus(config: ConfigDict, given: Tokenizer | None, files: list[Path] | None) -> Corpus:
    """Find the text of a config. Of conversations the template stays empty where a pretrained tokenizer brings it."""
    data, chat = config.data, config.data.format == "chat"
    files = files or find_files(data.text_glob, data.format)
    if not chat:
        return Corpus(files, data.text_field, data.encoding_errors, encoding=data.encoding)
    from_tokenizer = config.tokenizer.kind == "hf" and not given and not config.tokenizer.chat_template
    template = "" if from_tokenizer else _chat_template(config, given)
    # The settings are for a tokenizer that is trained on the rendered text.
    settings = {"eos_token": END_OF_TEXT}
    return ChatCorpus(files, "", data.encoding_errors, template, settings, encoding=data.encoding)


def _chat_template(config: ConfigDict, tokenizer: Tokenizer | None) -> str:
    """Return the template of conversations: the file that a config names, else the tokenizer's own."""
    if config.tokenizer.chat_template:
        return read_template(config.tokenizer.chat_template)
    own = tokenizer.settings.get("chat_template") if tokenizer else None
    if not own:
        raise UserError(
            "data.format='chat' needs a chat template, which turns messages into text, and the tokenizer has none. "
            "Tokenizers of instruct models have one. Start from such a model, or set tokenizer.chat_template to a "
            "Jinja file."
        )
    return own


def _fingerprint(config: ConfigDict, files: list[Path]) -> str:
    """Hash what the token files depend on: path, size and time of each source file, and the config's values."""
    kind, options = config.tokenizer.kind, config.tokenizer
    values = {"char": [], "bpe": [options.vocab_size, options.training_megabytes], "hf": [options.pretrained]}[kind]
    sources = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    data = [config.data.text_field, config.data.val_fraction, config.data.encoding_errors]
    if config.data.encoding != "utf-8":
        data += ["encoding", config.data.encoding]
    if config.data.format == "chat":  # the template itself is compared by its own hash
        data += ["chat", bool(options.chat_template)]
    return _sha256(json.dumps([FORMAT_VERSION, sources, data, kind, values]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _storage(directory: Path) -> Iterator[None]:
    """Turn an error of the file system into a UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"the token directory {directory} {'has no space left' if full else 'cannot be written'}: {error}. It "
            "takes 2 or 4 bytes a token. Free space, or set data.cache_dir to another directory."
        ) from error


def _check_directory(directory: Path, corpus: Corpus) -> None:
    """Make the directory; refuse one whose files jgpt did not write, and a disk that is clearly too small.

    A disk is too small when the tokens would not fit even at 8 bytes of text a token.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ours = (directory / "meta.json").exists() or (directory / "tokenizer").exists()
    for name in FILES:
        if (directory / name).exists() and not ours:
            raise UserError(
                f"{directory / name} exists, and jgpt did not write it. A token directory must be new, or written by "
                "jgpt. Set data.cache_dir to another directory."
            )
    remove_leftovers(directory)
    remove_leftovers(directory / "tokenizer")
    needed, free = corpus.n_bytes // 4, shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"at least {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _write_tokens(directory: Path, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> dict[str, Any]:
    """Tokenize a corpus into train.bin and val.bin; return their entries of meta.json."""
    with atomic_file(directory / "train.bin", "w+b") as train, atomic_file(directory / "val.bin", "w+b") as val:
        if isinstance(corpus, ChatCorpus):
            meta = write_conversations(train, val, corpus, tokenizer, val_fraction)
            meta["template_sha256"] = _sha256(corpus.template)
        else:
            meta = _write_documents(train, val, corpus, tokenizer, val_fraction)
    with (directory / "train.bin").open("rb") as written:
        return meta | {"train_sha256": hashlib.file_digest(written, "sha256").hexdigest()}


def _write_documents(
    train: BinaryIO, val: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float
) -> dict[str, Any]:
    """Tokenize plain text into two open files of ids, with an end-of-text id after each document.

    Return their entries of meta.json. Raises UserError when there is no text.
    """
    started = time.monotonic()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    end_of_text = np.array([tokenizer.eot_id], dtype).tobytes()
    period = max(2, round(1 / val_fraction)) if val_fraction else 0  # one document in each `period` is for validation
    n_documents, text_bytes, files = 0, [0, 0], (train, val)
    for batch in batched_by_characters(corpus.pieces("tokens"), lambda piece: len(piece.text)):
        all_ids = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, all_ids, strict=True):
            assert ids.max(initial=0) < tokenizer.vocab_size
            split = int(period > 0 and n_documents % period == period - 1)
            files[split].write(ids.astype(dtype).tobytes() + end_of_text * piece.ends_document)
            text_bytes[split] += len(piece.text.encode())
            n_documents += piece.ends_document
    n_tokens = [file.tell() // dtype.itemsize for file in files]
    total, total_bytes = sum(n_tokens), sum(text_bytes)
    if total == 0:
        raise UserError(
            f"the {len(corpus.files)} files that data.text_glob matches hold no text. Training needs some. "
            "Set data.text_glob to files that are not empty."
        )
    by_document = val_fraction / 2 <= n_tokens[1] / total <= val_fraction * 2
    if not by_document:
        n_tokens = [total - round(total * val_fraction), round(total * val_fraction)]
        _split_by_position(train, val, n_tokens[0] * dtype.itemsize)
        text_bytes[1] = _text_bytes(val, dtype, tokenizer)
        text_bytes[0] = total_bytes - text_bytes[1]
    seconds = time.monotonic() - started
    log.info(
        "tokens: files %d, documents %s, %.1f MB at %.1f MB/s: %s tokens, %.2f bytes a token, %.1f s%s",
        *(len(corpus.files), f"{n_documents:,}", total_bytes / 1e6, total_bytes / 1e6 / seconds, f"{total:,}"),
        *(total_bytes / total, seconds, corpus.remarks()),
    )
    return {
        "format": "text",
        "dtype": dtype.name,
        "train_tokens": n_tokens[0],
        "val_tokens": n_tokens[1],
        "train_bytes": text_bytes[0],  # of text as UTF-8, for bits per byte
        "val_bytes": text_bytes[1],
        "n_documents": n_documents,
        "split": "document" if by_document else "position",
        "replaced_characters": corpus.replaced,
    }


def _split_by_position(train: BinaryIO, val: BinaryIO, train_bytes: int) -> None:
    """Move tokens between the two files so that the first has `train_bytes`: for few documents of unequal size."""
    val.seek(0)
    shutil.copyfileobj(val, train, CHUNK_BYTES)
    val.seek(0)
    val.truncate()
    train.seek(train_bytes)
    shutil.copyfileobj(train, val, CHUNK_BYTES)
    train.truncate(train_bytes)


def _text_bytes(file: BinaryIO, dtype: np.dtype, tokenizer: Tokenizer) -> int:
    """Count the UTF-8 bytes of a file's text, to within a few bytes for each chunk that ends inside a character."""
    file.seek(0)
    n_bytes = 0
    while chunk := file.read(1 << 18):
        ids = np.frombuffer(chunk, dtype)
        n_bytes += len(tokenizer.decode(ids[ids != tokenizer.eot_id]).encode())
    return n_bytes
