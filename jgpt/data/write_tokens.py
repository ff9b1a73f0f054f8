"""Tokenize documents and write the token files.

In the data path: after `corpus.py` and `tokenizer.py`; before `token_files.py`, which opens the files. All tokens are
written in parts (`parts.py`): mostly in one, or by several processes at once, each with its own.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.atomic_write import remove_leftovers
from jgpt.data.config_text import chat_template, find_text, open_corpus
from jgpt.data.conversations import ChatCorpus, write_conversations
from jgpt.data.corpus import Corpus
from jgpt.data.made_from import difference_of, fingerprint, setting_values, settings_hash, sha256
from jgpt.data.make_tokenizer import make_tokenizer
from jgpt.data.parts import (
    ALL,
    PARTS,
    Part,
    all_parts,
    complete_part,
    is_complete,
    join_parts,
    part_directory,
    plan_difference,
    range_of,
    read_plan,
    remove_parts,
    write_plan,
)
from jgpt.data.remote import TextFile
from jgpt.data.token_directory import (
    FORMAT_VERSION,
    check_room,
    hold_token_directory,
    make_token_directory,
    read_token_meta,
    remove_tokens,
    storage_errors,
    token_directory,
)
from jgpt.data.token_files import TokenData, map_token_files, open_token_files
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.data.write_documents import write_documents
from jgpt.data.write_shards import ShardWriter
from jgpt.errors import UserError
from jgpt.file_lock import hold

log = logging.getLogger("jgpt")


def prepare(
    config: ConfigDict, tokenizer_dir: Path | None = None, files: Sequence[TextFile] | None = None
) -> TokenData:
    """Return the tokens of a config's text; tokenize it unless the token directory is up to date.

    `tokenizer_dir` holds the tokenizer of a resumed run; without it, the config's own is trained or loaded. `files` are
    what `find_text` found for the config, where the caller has them already. While another process prepares tokens in
    the same directory, this one waits for it. Raises UserError on bad text, on a disk that is full or cannot be
    written, on damaged token files, and where the tokens are prepared in parts that are not all there.
    """
    directory = token_directory(config)
    files = find_text(config) if files is None else files
    given = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    corpus = open_corpus(config, given, files)
    with _held(directory) as held:
        difference = _difference(directory, held, config, corpus, given)
        if difference:
            _refuse_parts(directory)
            with storage_errors(directory):
                try:
                    plan, tokenizer = _begin(directory, held, config, corpus, given, 1)
                    _write_part(directory, held, plan, ALL, corpus, tokenizer)
                    join_parts(directory, plan, tokenizer)
                except BaseException:
                    remove_parts(directory)
                    raise
        opened = open_token_files(directory)
    data = map_token_files(opened)
    if not difference:
        _say_up_to_date(data, directory)
    return data


def prepare_part(config: ConfigDict, part: Part, files: Sequence[TextFile] | None = None) -> TokenData | None:
    """Tokenize one part of a config's text, while other processes do the others; the last one to end joins them.

    Returns the tokens, the same as those of `prepare`, where all parts are complete; else None. The first process makes
    the tokenizer, from the whole text; the others wait for it. A part that failed or was killed is repeated by the same
    call; one that is complete is not made again. Raises UserError as `prepare`, and where the other parts are of
    another text, of other settings, or of another number of parts.
    """
    if config.data.format == "chat":
        raise UserError(
            f"--shard={part} and data.format='chat' were given. Conversations are prepared by one process. Leave out"
            " --shard."
        )
    directory = token_directory(config)
    files = find_text(config) if files is None else files
    corpus = open_corpus(config, None, files)
    with _held(directory) as held:
        difference = _difference(directory, held, config, corpus, None)
        if difference:
            with storage_errors(directory):
                plan, tokenizer = _share(directory, held, config, corpus, part)
        else:
            opened = open_token_files(directory)
    if not difference:
        data = map_token_files(opened)
        _say_up_to_date(data, directory)
        return data
    folder = part_directory(directory, part)
    with storage_errors(directory), hold(folder, wait_for=f"preparing shard {part}") as held:
        # Whoever held it may have made this part, or joined all.
        if read_plan(directory) == plan and not is_complete(directory, plan, part):
            _write_part(directory, held, plan, part, corpus, tokenizer)
    with _held(directory) as held:
        if _difference(directory, held, config, corpus, None) and not _join(directory, held, plan, part, tokenizer):
            return None
        opened = open_token_files(directory)
    return map_token_files(opened)


def _join(directory: Path, held: bool, plan: dict[str, Any], part: Part, tokenizer: Tokenizer) -> bool:
    """Join all parts, now that `part` is complete; return False, and log which, where some are not complete yet.

    Raises UserError where the parts in the directory are of another plan by now.
    """
    if read_plan(directory) != plan:
        raise UserError(
            f"{directory / PARTS} was removed or made again while shard {part} was prepared. All shards must "
            "have the same text and settings. Run this command again."
        )
    with storage_errors(directory):
        if held:
            remove_leftovers(directory)  # of a process that was killed while it joined
        missing = join_parts(directory, plan, tokenizer)
    if missing:
        log.info(
            "tokens: shard %s is complete. %d of %d are not yet: %s. The last one joins them",
            part, len(missing), part.n, ", ".join(map(str, missing[:20])),
        )  # fmt: skip
        return False
    log.info("tokens: %d shards are joined in %s", part.n, directory)
    return True


@contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Hold the token directory while the block runs; make it where it is missing. Yield whether it is really held."""
    with storage_errors(directory):
        make_token_directory(directory)
        holding = hold_token_directory(directory)
        held = holding.__enter__()
    try:
        yield held
    finally:
        holding.__exit__(None, None, None)


def _say_up_to_date(data: TokenData, directory: Path) -> None:
    log.info("tokens: %s tokens in %s are up to date", f"{len(data.train) + len(data.val):,}", directory)


def _difference(directory: Path, held: bool, config: ConfigDict, corpus: Corpus, given: Tokenizer | None) -> str:
    """Say why the tokens in a directory do not serve a config; "" where they do.

    `given` is the tokenizer of a resumed run. Raises UserError where the text is gone, so that nothing can be made.
    """
    meta = read_token_meta(directory)
    difference = difference_of(meta, config, corpus, given)
    if not difference:
        if held:
            remove_parts(directory)  # of a process that was killed at its end
    elif not corpus.files:
        raise UserError(
            f"data.text_glob={config.data.text_glob!r} matches no text here, and the tokens in {directory} cannot "
            f"serve instead: {difference}. Put the text back, or take back what changed in the config."
        )
    elif meta:
        log.info("tokens: those in %s are made again: %s", directory, difference)
    return difference


def _refuse_parts(directory: Path) -> None:
    """Raise UserError where several processes prepare the tokens of a directory, and not all of them are done."""
    plan = read_plan(directory)
    if plan and plan["n_parts"] > 1:
        n, missing = plan["n_parts"], [str(part) for part in all_parts(plan) if not is_complete(directory, plan, part)]
        raise UserError(
            f"the tokens in {directory} are prepared in {n} shards, and not all are complete "
            f"(missing: {', '.join(missing[:20]) or 'none, but they are not joined'}). Run jgpt prepare with "
            f"--shard={(missing or [f'0/{n}'])[0]} and so on for those; or, if nobody prepares them any more, delete "
            f"{directory / PARTS}."
        )


def _begin(
    directory: Path, held: bool, config: ConfigDict, corpus: Corpus, given: Tokenizer | None, n_parts: int
) -> tuple[dict[str, Any], Tokenizer]:
    """Make the tokenizer, a resumed run's or a new one, remove the old tokens, and write the plan of the parts."""
    plan = _plan(config, corpus, n_parts)  # before reading: a text that changes meanwhile is read again
    if held:  # else they may be those of a process that is at work
        remove_leftovers(directory)
        remove_leftovers(directory / "tokenizer")
    check_room(directory, corpus.n_bytes // 4)  # they would not fit even at 8 bytes of text a token
    tokenizer = given or make_tokenizer(config.tokenizer, corpus)
    if isinstance(corpus, ChatCorpus):
        corpus.template = tokenizer.settings["chat_template"] = chat_template(config, tokenizer)
        corpus.settings = tokenizer.settings
    remove_tokens(directory)  # only now that the tokenizer is there: a wrong name for it must not cost the old files
    tokenizer.save(directory / "tokenizer", config.model.context_length)
    plan["meta"] |= {
        "tokenizer_given": given is not None,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
    }
    return write_plan(directory, plan), tokenizer


def _share(
    directory: Path, held: bool, config: ConfigDict, corpus: Corpus, part: Part
) -> tuple[dict[str, Any], Tokenizer]:
    """Return the plan and the tokenizer that the other parts have; without one, begin. Raises UserError."""
    plan = read_plan(directory)
    if not plan or plan["n_parts"] == 1:  # of a process that was killed
        return _begin(directory, held, config, corpus, None, part.n)
    if difference := plan_difference(plan, _plan(config, corpus, part.n)):
        raise UserError(
            f"--shard={part} does not belong to the shards in {directory / PARTS}: {difference}. All shards must have "
            f"the same text, settings and number. Use those; or, to begin again, delete {directory / PARTS}."
        )
    tokenizer = load_tokenizer(directory / "tokenizer")
    if tokenizer.sha256 != plan["meta"]["tokenizer_sha256"]:
        raise UserError(
            f"{directory / 'tokenizer'} is not the tokenizer of the shards in {directory / PARTS}. All must have the "
            f"same. Put it back; or, to begin again, delete {directory / PARTS}."
        )
    return plan, tokenizer


def _plan(config: ConfigDict, corpus: Corpus, n_parts: int) -> dict[str, Any]:
    """Return what a token directory is made of, so far as it is known before the tokenizer is made."""
    return {
        "n_parts": n_parts,
        "settings": setting_values(config),
        "meta": {
            "format_version": FORMAT_VERSION,
            "text_glob": config.data.text_glob,
            "n_files": len(corpus.files),
            "settings_sha256": settings_hash(config),
            "fingerprint": fingerprint(config, corpus.files),
            "tokenizer_kind": config.tokenizer.kind,
        },
        "n_bytes": corpus.n_bytes,
    }


def _write_part(
    directory: Path, held: bool, plan: dict[str, Any], part: Part, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """Tokenize the files of a part; `corpus` has the files of all. Where it fails, no file of it stays."""
    folder = part_directory(directory, part)
    folder.mkdir(parents=True, exist_ok=True)
    if held:
        _remove_files(folder)  # of a process that was killed
    if part.n > 1:
        mine = range_of([file.stat().st_size for file in corpus.files], part)
        corpus = replace(corpus, files=corpus.files[mine.start : mine.stop], first_file=mine.start)
        log.info("tokens: shard %s has %d of %d files", part, len(mine), plan["meta"]["n_files"])
    label = "tokens" if part == ALL else f"tokens {part}"
    try:
        with ShardWriter(folder, "train") as train, ShardWriter(folder, "val") as val:
            fraction = plan["settings"]["data.val_fraction"]
            if isinstance(corpus, ChatCorpus):
                entries = write_conversations(train, val, corpus, tokenizer, fraction)
                entries["template_sha256"] = sha256(corpus.template)
            else:
                entries = write_documents(train, val, corpus, tokenizer, fraction, label)
    except BaseException:
        _remove_files(folder)
        raise
    complete_part(directory, plan, part, entries | {"train_shards": train.shards, "val_shards": val.shards})


def _remove_files(folder: Path) -> None:
    for path in folder.glob("[!.]*"):  # not the lock
        path.unlink(missing_ok=True)
