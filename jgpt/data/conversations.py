"""Conversations to words: .jsonl lines of messages in, ids that know what is learned out.

A line is {"messages": [{"role": "system", "user" or "assistant", "content": TEXT}, ...]}; other fields are not read.
Before in the data path: `corpus.py`, `chat.py` and `tokenizer.py`; after: `token_files.py`, which keeps the words, and
`packing.py`.

A word is a uint32: the id in its low 30 bits, bit 31 where the token is learned (the assistant wrote it, its end of
turn included), bit 30 where a conversation begins. Conversations follow one another without a gap.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jgpt.data.chat_template import Message, answers
from jgpt.data.corpus import Corpus, Piece
from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError

LEARNED, BEGINS = np.uint32(1 << 31), np.uint32(1 << 30)
IDS = np.uint32(BEGINS - 1)
ROLES = ("system", "user", "assistant")
BATCH_CHARACTERS = 1 << 22  # text that is tokenized at a time: enough for all cores, little memory
log = logging.getLogger("jgpt")


class Conversation(NamedTuple):
    """One line, rendered: see `chat.answers` for `texts`."""

    texts: list[list[str]]
    n_bytes: int  # of the assistant's messages that are learned, as UTF-8


@dataclass
class ChatCorpus(Corpus):
    """The conversations of .jsonl files; as documents, where a tokenizer is trained on them, they are rendered text."""

    template: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # the tokenizer's, see `chat.render`
    unanswered: int = field(default=0, init=False)  # left out by the last `conversations()`: nothing to learn in them

    def pieces(self, progress: str = "") -> Iterator[Piece]:
        for conversation in self.conversations(progress):
            for parts in conversation.texts:
                yield Piece("".join(parts), ends_document=True)

    def conversations(self, progress: str = "") -> Iterator[Conversation]:
        """Stream all conversations that have an answer, under a bar on a terminal when `progress` names what is done.

        Raises UserError, naming file and line, on what is no conversation and on what the template refuses.
        """
        self.unanswered = 0
        for place, record in self._read(self._jsonl_records, progress):
            messages = self._messages(record, place)
            try:
                texts = answers(self.template, self.settings, messages)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            if texts:
                learned = (message["content"] for message in messages[1:] if message["role"] == "assistant")
                yield Conversation(texts, sum(len(content.encode()) for content in learned))
            else:
                self.unanswered += 1

    def _messages(self, record: Any, place: str) -> list[Message]:
        messages = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list) or not messages:
            have = f"has the fields {sorted(record)}" if isinstance(record, dict) else f"is {str(record)[:40]!r}"
            have = "is an empty list" if messages == [] else have
            raise UserError(f"{place} has no list of messages: it {have}. {_LINE}")
        return [self._message(message, f"{place}, message {i}") for i, message in enumerate(messages, 1)]

    def _message(self, message: Any, place: str) -> Message:
        if not isinstance(message, dict):
            raise UserError(f"{place} is {str(message)[:40]!r}, which is no object. {_LINE}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{place} has the role {role!r}. Allowed: {', '.join(ROLES)}. {_LINE}")
        if not isinstance(content, str):
            raise UserError(f"{place} has the content {str(content)[:40]!r}, which is no text. {_LINE}")
        if role == "assistant" and not content.strip():
            raise UserError(
                f"{place} is an empty answer, which would teach the model to say nothing. Answers must hold text. "
                "Fill it in, or take the line out."
            )
        return {"role": role, "content": self._well_formed(content, place)}


_LINE = 'A line must be {"messages": [{"role": "user", "content": "..."}, ...]}. Mend it, or take it out.'


def write_conversations(
    train: BinaryIO, val: BinaryIO, corpus: ChatCorpus, tokenizer: Tokenizer, val_fraction: float
) -> dict[str, Any]:
    """Tokenize conversations into two files of words; return what meta.json says of them.

    Raises UserError when there are not enough to have both.
    """
    started = time.monotonic()
    period, files = max(2, round(1 / val_fraction)), (train, val)
    n_conversations, text_bytes = 0, 0
    n_words, n_targets, n_bytes = [0, 0], [0, 0], [0, 0]
    for batch in _batches(corpus.conversations("tokens")):
        encoded = iter(tokenizer.encode_parts([parts for conversation in batch for parts in conversation.texts]))
        for conversation in batch:
            split = int(n_conversations % period == 1)  # from the second on, one of so many is held out
            n_conversations += 1
            n_bytes[split] += conversation.n_bytes
            for parts in conversation.texts:
                words = to_words(next(encoded))
                assert (words & IDS).max() < tokenizer.vocab_size
                files[split].write(words.tobytes())
                n_words[split] += len(words)
                n_targets[split] += int(np.count_nonzero(words & LEARNED))
                text_bytes += sum(len(part.encode()) for part in parts)
    if n_conversations < 2:
        raise UserError(
            f"the {len(corpus.files)} files that data.text_glob matches hold {n_conversations} conversations with an "
            f"answer of the assistant, and {corpus.unanswered} without. At least two with one are needed, as one is "
            "held out. Pass --config.data.text_glob=GLOB with more."
        )
    seconds = time.monotonic() - started
    log.info(
        "tokens: files %d, conversations %s, %.1f MB at %.1f MB/s: %s tokens, %.0f%% of them learned, %.1f s%s",
        *(len(corpus.files), f"{n_conversations:,}", text_bytes / 1e6, text_bytes / 1e6 / seconds),
        *(f"{sum(n_words):,}", 100 * sum(n_targets) / sum(n_words), seconds),
        f", {corpus.replaced:,} characters replaced" if corpus.replaced else "",
    )
    if corpus.unanswered:
        log.warning("%s conversations hold no answer of the assistant: left out", f"{corpus.unanswered:,}")
    return {
        "format": "chat",
        "word": "uint32: id in bits 0 to 29, bit 30: a conversation begins, bit 31: the token is learned",
        "dtype": "uint32",
        "train_tokens": n_words[0],
        "val_tokens": n_words[1],
        "train_targets": n_targets[0],  # learned tokens
        "val_targets": n_targets[1],
        "train_bytes": n_bytes[0],  # of the assistant's messages as UTF-8: what bits per byte counts by
        "val_bytes": n_bytes[1],
        "n_documents": n_conversations,
        "unanswered_conversations": corpus.unanswered,
        "split": "conversation",
        "replaced_characters": corpus.replaced,
    }


def to_words(parts: list[np.ndarray]) -> np.ndarray:
    """Join the ids of a text's parts, of which every second is learned.

    >>> [hex(word) for word in to_words([np.uint32([1, 2]), np.uint32([3])])]
    ['0x40000001', '0x2', '0x80000003']
    """
    words = np.concatenate([ids | LEARNED if i % 2 else ids for i, ids in enumerate(parts)])
    words[0] |= BEGINS
    return words


def _batches(conversations: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    batch: list[Conversation] = []
    n_characters = 0
    for conversation in conversations:
        batch.append(conversation)
        n_characters += sum(len(part) for parts in conversation.texts for part in parts)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    yield batch
