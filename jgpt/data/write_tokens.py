"""Tokenize documents and write the token files.

In the data path: after `corpus.py` and `tokenizer.py`; before `token_files.py`, which opens the files.
"""

import hashlib
import json
import logging
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from jgpt.atomic_write import atomic_file, remove_leftovers
from jgpt.data.chat_template import read_template
from jgpt.data.conversations import ChatCorpus, write_conversations
from jgpt.data.corpus import Corpus, batched_by_characters
from jgpt.data.find_files import find_files
from jgpt.data.token_directory import (
    FILES,
    FORMAT_VERSION,
    check_room,
    hold_token_directory,
    make_token_directory,
    read_token_meta,
    storage_errors,
    token_directory,
    write_token_meta,
)
from jgpt.data.token_files import TokenData, hashes_of, map_token_files, open_token_files
from jgpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, make_tokenizer
from jgpt.errors import UserError

COPY_BYTES = 1 << 24
log = logging.getLogger("jgpt")


def prepare(config: ConfigDict, tokenizer_dir: Path | None = None, files: list[Path] | None = None) -> TokenData:
    """Return the tokens of a config's text; tokenize it unless the token directory is up to date.

    `tokenizer_dir` holds the tokenizer of a resumed run; without it, the config's own is trained or loaded. `files` are
    what `find_text` found for the config, where the caller has them already. While another process prepares tokens in
    the same directory, this one waits for it. Raises UserError on bad text, on a disk that is full or cannot be
    written, and on damaged token files.
    """
    directory = token_directory(config)
    files = find_text(config) if files is None else files
    given = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    corpus = _open_corpus(config, given, files)
    with ExitStack() as holding:
        with storage_errors(directory):
            make_token_directory(directory)
            held = holding.enter_context(hold_token_directory(directory))
        meta = read_token_meta(directory)
        difference = _difference(meta, config, corpus, given)
        if difference and not files:
            raise UserError(
                f"data.text_glob={config.data.text_glob!r} matches no text here, and the tokens in {directory} cannot "
                f"serve instead: {difference}. Put the text back, or take back what changed in the config."
            )
        if difference:
            if meta:
                log.info("tokens: those in %s are made again: %s", directory, difference)
            with storage_errors(directory):
                _write_directory(directory, held, config, corpus, given)
        opened = open_token_files(directory)
    data = map_token_files(opened)
    if not difference:
        log.info("tokens: %s tokens in %s are up to date", f"{len(data.train) + len(data.val):,}", directory)
    return data


def find_text(config: ConfigDict) -> list[Path]:
    """List the files of a config's text; [] where they are gone and their tokens are complete, with a warning.

    Raises UserError where there is no text and no tokens that were made from the same data.text_glob.
    """
    try:
        return find_files(config.data.text_glob, "chat" if config.data.format == "chat" else "text")
    except UserError as error:
        directory, reason = token_directory(config), str(error).split(". ")[0]
        meta = read_token_meta(directory)
        if meta.get("format_version") != FORMAT_VERSION or meta.get("text_glob") != config.data.text_glob:
            raise
    log.warning(
        "%s. Training continues from the tokens in %s, which were made from %s",
        reason,
        directory,
        f"{meta['n_files']:,} files that data.text_glob={config.data.text_glob!r} matched before",
    )
    return []


def _difference(meta: dict[str, Any], config: ConfigDict, corpus: Corpus, given: Tokenizer | None) -> str:
    """Say why a token directory with this meta.json does not serve a config; "" where it does.

    `given` is the tokenizer of a resumed run. Text that is gone, a corpus without files, is not compared.
    """
    if meta.get("format_version") != FORMAT_VERSION:
        return "they are of another version of jgpt"
    if meta["settings_sha256"] != _settings(config):
        return "they were made with other settings of data or tokenizer"
    if corpus.files and meta["fingerprint"] != _fingerprint(config, corpus.files):
        return "the text has changed"
    # Tokens of a resumed run's tokenizer belong to that run only, even when the text is the same.
    if meta["tokenizer_sha256"] != given.sha256 if given else meta["tokenizer_given"]:
        return "they were made with another tokenizer"
    template = corpus.template if isinstance(corpus, ChatCorpus) else ""
    if template and meta["template_sha256"] != _sha256(template):
        return "they were made with another chat template"
    return ""


def _write_directory(directory: Path, held: bool, config: ConfigDict, corpus: Corpus, given: Tokenizer | None) -> None:
    """Tokenize a corpus into a token directory, with the tokenizer of a resumed run or a new one."""
    fingerprint = _fingerprint(config, corpus.files)  # before reading: a text that changes meanwhile is read again
    if held:  # else they may be those of a process that is at work
        remove_leftovers(directory)
        remove_leftovers(directory / "tokenizer")
    check_room(directory, corpus.n_bytes // 4)  # they would not fit even at 8 bytes of text a token
    tokenizer = given or make_tokenizer(config.tokenizer, corpus)
    if isinstance(corpus, ChatCorpus):
        corpus.template = tokenizer.settings["chat_template"] = _chat_template(config, tokenizer)
        corpus.settings = tokenizer.settings
    for name in FILES:  # only now that the tokenizer is there: a wrong name for it must not cost the old files
        (directory / name).unlink(missing_ok=True)
    tokenizer.save(directory / "tokenizer", config.model.context_length)
    meta = {
        "format_version": FORMAT_VERSION,
        "text_glob": config.data.text_glob,
        "n_files": len(corpus.files),
        "settings_sha256": _settings(config),
        "fingerprint": fingerprint,
        "tokenizer_kind": config.tokenizer.kind,
        "tokenizer_given": given is not None,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
    } | _write_tokens(directory, corpus, tokenizer, config.data.val_fraction)
    write_token_meta(directory, meta)


def _open_corpus(config: ConfigDict, given: Tokenizer | None, files: list[Path]) -> Corpus:
    """Open the text of a config. Of conversations the template stays empty where a pretrained tokenizer brings it."""
    data, chat = config.data, config.data.format == "chat"
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
    try:
        sources = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:  # deleted since it was found, while this process waited for another
        raise UserError(
            f"{error.filename} cannot be read: {error.strerror}. Put it back, or leave it out of data.text_glob."
        ) from None
    return _sha256(json.dumps([_settings(config), sources]))  # ASCII: a name that is not UTF-8 has no bytes


def _settings(config: ConfigDict) -> str:
    """Hash the config's values that the token files depend on."""
    kind, options = config.tokenizer.kind, config.tokenizer
    values = {"char": [], "bpe": [options.vocab_size, options.training_megabytes], "hf": [options.pretrained]}[kind]
    d = config.data
    data = [d.text_field, d.val_fraction, d.encoding, d.encoding_errors]
    if config.data.format == "chat":  # the template itself is compared by its own hash
        data += ["chat", bool(options.chat_template)]
    return _sha256(json.dumps([FORMAT_VERSION, data, kind, values]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_tokens(directory: Path, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> dict[str, Any]:
    """Tokenize a corpus into train.bin and val.bin; return their entries of meta.json."""
    with atomic_file(directory / "train.bin", "w+b") as train, atomic_file(directory / "val.bin", "w+b") as val:
        if isinstance(corpus, ChatCorpus):
            meta = write_conversations(train, val, corpus, tokenizer, val_fraction)
            meta["template_sha256"] = _sha256(corpus.template)
        else:
            meta = _write_documents(train, val, corpus, tokenizer, val_fraction)
        return meta | hashes_of("train", train) | hashes_of("val", val)  # of the open files, which are nobody else's


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
    shutil.copyfileobj(val, train, COPY_BYTES)
    val.seek(0)
    val.truncate()
    train.seek(train_bytes)
    shutil.copyfileobj(train, val, COPY_BYTES)
    train.truncate(train_bytes)


def _text_bytes(file: BinaryIO, dtype: np.dtype, tokenizer: Tokenizer) -> int:
    """Count the UTF-8 bytes of a file's text, to within a few bytes for each chunk that ends inside a character."""
    file.seek(0)
    n_bytes = 0
    while chunk := file.read(1 << 18):
        ids = np.frombuffer(chunk, dtype)
        n_bytes += len(tokenizer.decode(ids[ids != tokenizer.eot_id]).encode())
    return n_bytes
