"""Documents to token files, written once.

Before in the data path: `corpus.py` and `tokenizer.py`; after: `token_files.py`, which opens what is written here.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from jgpt.atomic_write import write_file
from jgpt.data.chat_template import read_template
from jgpt.data.conversations import BATCH_CHARACTERS, ChatCorpus, write_conversations
from jgpt.data.corpus import Corpus, Piece
from jgpt.data.find_files import find_files
from jgpt.data.token_files import FORMAT_VERSION, TokenData, open_token_data, read_token_meta, token_directory
from jgpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from jgpt.errors import UserError

FILES = ("meta.json", "train.bin", "val.bin")  # meta.json: first to go, last to come
CHUNK_BYTES = 1 << 24
log = logging.getLogger("jgpt")


def prepare(config: ConfigDict, tokenizer_dir: Path | None = None, files: list[Path] | None = None) -> TokenData:
    """Return the tokens of a config's text: from the token directory when nothing has changed, else made anew.

    `tokenizer_dir` holds the tokenizer of a run that goes on; without it the config's own is trained or loaded. `files`
    are what `find_files` found for the config, where the caller has them already.
    Raises UserError on bad text, an unwritable or full disk, and token files that are damaged.
    """
    directory = token_directory(config)
    given = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    corpus = _open_corpus(config, given, files)
    template = corpus.template if isinstance(corpus, ChatCorpus) else ""
    fingerprint = _fingerprint(config, corpus.files)
    meta = read_token_meta(directory)
    # Tokens that a run made with a tokenizer of its own are that run's alone, also when the text is the same.
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
        for name in FILES:  # not before the tokenizer is there: a mistake in its name shall cost nothing
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
    """Find the text of a config; of conversations with the template, where it does not come with the tokenizer."""
    data, chat = config.data, config.data.format == "chat"
    files = files or find_files(data.text_glob, data.format)
    if not chat:
        return Corpus(files, data.text_field, data.encoding_errors)
    unknown = config.tokenizer.kind == "hf" and not given and not config.tokenizer.chat_template
    template = "" if unknown else _chat_template(config, given)
    # These settings are for a tokenizer that is trained on the rendered text.
    return ChatCorpus(files, "", data.encoding_errors, template, {"eos_token": END_OF_TEXT})


def _chat_template(config: ConfigDict, tokenizer: Tokenizer | None) -> str:
    """Return the template of conversations: the file that a config names, else the tokenizer's own."""
    if config.tokenizer.chat_template:
        return read_template(config.tokenizer.chat_template)
    own = tokenizer.settings.get("chat_template") if tokenizer else None
    if not own:
        raise UserError(
            "data.format='chat' needs a chat template, which turns messages into text, and the tokenizer has none. "
            "Tokenizers of instruct models have one. Begin from such a model, or name a Jinja file by "
            "--config.tokenizer.chat_template=FILE."
        )
    return own


def _fingerprint(config: ConfigDict, files: list[Path]) -> str:
    """Hash all that decides the token files: sources as the file system sees them, and the options that matter."""
    kind, options = config.tokenizer.kind, config.tokenizer
    matters = {"char": [], "bpe": [options.vocab_size, options.training_megabytes], "hf": [options.pretrained]}[kind]
    sources = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    data = [config.data.text_field, config.data.val_fraction, config.data.encoding_errors]
    if config.data.format == "chat":  # the template itself is compared by its own hash
        data += ["chat", bool(options.chat_template)]
    return _sha256(json.dumps([FORMAT_VERSION, sources, data, kind, matters]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _storage(directory: Path) -> Iterator[None]:
    """Turn what the file system answers into a UserError, and leave no temporary files behind."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"the token directory {directory} {'has no space left' if full else 'cannot be written'}: {error}. It "
            "takes 2 or 4 bytes a token. Free or mend it, or name another directory by --config.data.cache_dir=DIR."
        ) from error
    finally:
        for name in FILES:
            with suppress(OSError):
                _temporary(directory / name).unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _check_directory(directory: Path, corpus: Corpus) -> None:
    """Refuse a directory with somebody else's token files, and one where even 8 bytes of text a token would not fit."""
    directory.mkdir(parents=True, exist_ok=True)
    ours = (directory / "meta.json").exists() or (directory / "tokenizer").exists()
    for name in FILES:
        if (directory / name).exists() and not ours:
            raise UserError(
                f"{directory / name} is there already, and jgpt did not write it. A token directory must be new or "
                "jgpt's own. Name another one by --config.data.cache_dir=DIR."
            )
    needed, free = corpus.n_bytes // 4, shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"at least {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    n_characters = 0
    for piece in pieces:
        batch.append(piece)
        n_characters += len(piece.text)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    yield batch


def _write_tokens(directory: Path, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> dict[str, Any]:
    """Tokenize a corpus into train.bin and val.bin; return what meta.json says of them."""
    paths = (directory / "train.bin", directory / "val.bin")
    with _temporary(paths[0]).open("w+b") as train, _temporary(paths[1]).open("w+b") as val:
        if isinstance(corpus, ChatCorpus):
            meta = write_conversations(train, val, corpus, tokenizer, val_fraction)
            meta["template_sha256"] = _sha256(corpus.template)
        else:
            meta = _write_documents(train, val, corpus, tokenizer, val_fraction)
        for file in (train, val):
            file.flush()
            os.fsync(file.fileno())
    for path in paths:
        _temporary(path).replace(path)
    with paths[0].open("rb") as written:
        return meta | {"train_sha256": hashlib.file_digest(written, "sha256").hexdigest()}


def _write_documents(
    train: BinaryIO, val: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float
) -> dict[str, Any]:
    """Tokenize plain text into two files of ids, an end-of-text id behind each document."""
    started = time.monotonic()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    end_of_text = np.array([tokenizer.eot_id], dtype).tobytes()
    period = max(2, round(1 / val_fraction)) if val_fraction else 0  # every so many documents one is for validation
    n_documents, text_bytes, files = 0, [0, 0], (train, val)
    for batch in _batches(corpus.pieces("tokens")):
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
            "Pass --config.data.text_glob=GLOB with files that are not empty."
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
        *(total_bytes / total, seconds, f", {corpus.replaced:,} characters replaced" if corpus.replaced else ""),
    )
    return {
        "format": "text",
        "dtype": dtype.name,
        "train_tokens": n_tokens[0],
        "val_tokens": n_tokens[1],
        "train_bytes": text_bytes[0],  # of text as UTF-8: what bits per byte counts by
        "val_bytes": text_bytes[1],
        "n_documents": n_documents,
        "split": "document" if by_document else "position",
        "replaced_characters": corpus.replaced,
    }


def _split_by_position(train: BinaryIO, val: BinaryIO, train_bytes: int) -> None:
    """Join two files of tokens and cut them again, at `train_bytes`: few documents cannot be shared out fairly."""
    val.seek(0)
    shutil.copyfileobj(val, train, CHUNK_BYTES)
    val.seek(0)
    val.truncate()
    train.seek(train_bytes)
    shutil.copyfileobj(train, val, CHUNK_BYTES)
    train.truncate(train_bytes)


def _text_bytes(file: BinaryIO, dtype: np.dtype, tokenizer: Tokenizer) -> int:
    """Count the UTF-8 bytes that the tokens of a file stand for, to a few bytes a chunk (characters that it cuts)."""
    file.seek(0)
    n_bytes = 0
    while chunk := file.read(1 << 18):
        ids = np.frombuffer(chunk, dtype)
        n_bytes += len(tokenizer.decode(ids[ids != tokenizer.eot_id]).encode())
    return n_bytes
