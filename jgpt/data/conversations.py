"""Read conversations and turn them into words: token ids with marks for what is learned.

A line of .jsonl is {"messages": [{"role": "system", "user" or "assistant", "content": TEXT}, ...]}; other fields are
ignored. In the data path: after `corpus.py`, `chat_template.py` and `tokenizer.py`; before `token_files.py`, which
opens the files of words, and `packing.py`.

A word is a uint32: the id in bits 0 to 29; bit 31 where the token is learned, which is what the assistant wrote with
its end of turn; bit 30 where a conversation begins. Conversations follow one another without a gap.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jgpt.data.chat_template import Message, answers
from jgpt.data.corpus import Corpus, Piece, batched_by_characters
from jgpt.data.tokenizer import Tokenizer
from jgpt.errors import UserError

LEARNED, BEGINS = np.uint32(1 << 31), np.uint32(1 << 30)
IDS = np.uint32(BEGINS - 1)
ROLES = ("system", "user", "assistant")
log = logging.getLogger("jgpt")


class Conversation(NamedTuple):
    """One conversation, rendered as text."""

    texts: list[list[str]]  # see `chat_template.answers`
    n_bytes: int  # of the assistant's messages that are learned, as UTF-8

    def n_characters(self) -> int:
        """Count the characters of all texts."""
        return sum(len(part) for parts in self.texts for part in parts)


@dataclass
class ChatCorpus(Corpus):
    """The conversations of .jsonl files. `pieces()` yields each as rendered text, to train a tokenizer on."""

    template: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # the tokenizer's, see `chat_template.render`
    unanswered: int = field(default=0, init=False)  # that the last `conversations()` left out: nothing to learn

    def pieces(self, progress: str = "") -> Iterator[Piece]:
        for conversation in self.conversations(progress):
            for parts in conversation.texts:
                yield Piece("".join(parts), ends_document=True)

    def conversations(self, progress: str = "") -> Iterator[Conversation]:
        """Yield all conversations that have an answer; with `progress` as its label, a terminal shows a bar.

        Raises UserError, with file and line, when a line is not a conversation or the template refuses it.
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
            raise UserError(f"{place} is {str(message)[:40]!r}, which is not an object. {_LINE}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"{place} has the role {role!r}. Allowed: {', '.join(ROLES)}. {_LINE}")
        if not isinstance(content, str):
            raise UserError(f"{place} has the content {str(content)[:40]!r}, which is not text. {_LINE}")
        if role == "assistant" and not content.strip():
            raise UserError(
                f"{place} is an empty answer, which would teach the model to say nothing. Answers must hold text. "
                "Fill it in, or remove the line."
            )
        return {"role": role, "content": self._well_formed(content, place)}


_LINE = 'A line must be {"messages": [{"role": "user", "content": "..."}, ...]}. Correct it, or remove it.'


def write_conversations(
    train: BinaryIO, val: BinaryIO, corpus: ChatCorpus, tokenizer: Tokenizer, val_fraction: float
) -> dict[str, Any]:
    """Tokenize conversations into two open files of words; return their entries of meta.json.

    Raises UserError when there are fewer than two conversations with an answer.
    """
    started = time.monotonic()
    period, files = max(2, round(1 / val_fraction)), (train, val)
    n_conversations, text_bytes = 0, 0
    n_words, n_targets, n_bytes = [0, 0], [0, 0], [0, 0]
    for batch in batched_by_characters(corpus.conversations("tokens"), Conversation.n_characters):
        encoded = iter(tokenizer.encode_parts([parts for conversation in batch for parts in conversation.texts]))
        for conversation in batch:
            split = int(n_conversations % period == 1)  # the second conversation is held out, then one in each `period`
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
            f"answer of the assistant, and {corpus.unanswered} without. At least two with an answer are needed: one is "
            "held out for validation. Give more conversations, or set data.text_glob to other files."
        )
    seconds = time.monotonic() - started
    log.info(
        "tokens: files %d, conversations %s, %.1f MB at %.1f MB/s: %s tokens, %.0f%% of them learned, %.1f s%s",
        *(len(corpus.files), f"{n_conversations:,}", text_bytes / 1e6, text_bytes / 1e6 / seconds),
        *(f"{sum(n_words):,}", 100 * sum(n_targets) / sum(n_words), seconds),
        corpus.remarks(),
    )
    if corpus.unanswered:
        log.warning("%s conversations are left out: they hold no answer of the assistant", f"{corpus.unanswered:,}")
    return {
        "format": "chat",
        "word": "uint32: id in bits 0 to 29, bit 30: a conversation begins, bit 31: the token is learned",
        "dtype": "uint32",
        "train_tokens": n_words[0],
        "val_tokens": n_words[1],
        "train_targets": n_targets[0],  # learned tokens
        "val_targets": n_targets[1],
        "train_bytes": n_bytes[0],  # of the assistant's messages as UTF-8, for bits per byte
        "val_bytes": n_bytes[1],
        "n_documents": n_conversations,
        "unanswered_conversations": corpus.unanswered,
        "split": "conversation",
        "replaced_characters": corpus.replaced,
    }


def to_words(parts: list[np.ndarray]) -> np.ndarray:
    """Join the ids of a text's parts to words, uint32; every second part is learned.

    >>> [hex(word) for word in to_words([np.uint32([1, 2]), np.uint32([3])])]
    ['0x40000001', '0x2', '0x80000003']
    """
    words = np.concatenate([ids | LEARNED if i % 2 else ids for i, ids in enumerate(parts)])
    words[0] |= BEGINS
    return words
