"""Read conversations and turn them into words: token ids with marks for what is learned.

A line of .jsonl is {"messages": [{"role": "system", "user", "assistant" or "tool", "content": TEXT}, ...]}, or in
another layout that `chat_layouts.py` reads. All that it holds goes to the chat template: `tools` and other fields of
the line, `tool_calls`, `reasoning_content` and others of a message. `"weight": 0` on an answer means: seen, not
learned. What the template never reads is named at the end.

In the data path: after `corpus.py`, `chat_template.py` and `tokenizer.py`; before `token_files.py`, which opens the
files of words (`words.py`), and `packing.py`.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jgpt.data.chat_layouts import MEANING
from jgpt.data.chat_lines import ChatLine, read_chat_line
from jgpt.data.chat_template import answers
from jgpt.data.corpus import Corpus
from jgpt.data.not_text import lines_hint
from jgpt.data.pieces import Piece, batched_by_characters
from jgpt.data.remote import TextFile
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.words import IDS, LEARNED, to_words
from jgpt.data.write_shards import ShardWriter
from jgpt.errors import UserError

log = logging.getLogger("jgpt")


class Conversation(NamedTuple):
    """One conversation, rendered as text."""

    texts: list[list[str]]  # see `chat_template.answers`
    n_bytes: int  # of the assistant's messages that are learned, as UTF-8; never 0

    def n_characters(self) -> int:
        """Count the characters of all texts."""
        return sum(len(part) for parts in self.texts for part in parts)


@dataclass
class ChatCorpus(Corpus):
    """The conversations of .jsonl files. `pieces()` yields each as rendered text, to train a tokenizer on."""

    template: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # the tokenizer's, see `chat_template.render`
    unanswered: int = field(default=0, init=False)  # that the last `conversations()` left out: nothing to learn
    unread: Counter[str] = field(default_factory=Counter, init=False)  # fields that the template did not read
    layouts: Counter[str] = field(default_factory=Counter, init=False)  # the lines of each layout

    def pieces(self, progress: str = "") -> Iterator[Piece]:
        for conversation in self.conversations(progress):
            for parts in conversation.texts:
                yield Piece("".join(parts), ends_document=True)

    def conversations(self, progress: str = "") -> Iterator[Conversation]:
        """Yield all conversations that have an answer to learn; with `progress` as its label, a terminal shows a bar.

        Raises UserError, with file and line, when a line is not a conversation or the template refuses it.
        """
        self.unanswered, read = 0, set()
        self.unread.clear()
        self.layouts.clear()
        for place, record in self.records(progress):
            line = read_chat_line(record, place, self._well_formed)
            try:
                found = answers(self.template, self.settings, line.messages, line.learned, line.variables)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            self.layouts[line.layout] += 1
            read |= found.read | {f"{name} of the line" for name in found.variables}
            self.unread.update({f"{name} of the line" for name in line.variables})
            self.unread.update({name for message in line.messages for name in message} - {"role", "content"})
            if found.texts:
                n_bytes = _learned_bytes(line, found.read)
                parts = [part for parts in found.texts for part in parts[1::2]]  # where a call is all, and is not read
                yield Conversation(found.texts, n_bytes or sum(len(part.encode()) for part in parts))
            else:
                self.unanswered += 1
        for name in read:
            self.unread.pop(name, None)

    def records(self, progress: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the place and the JSON value of each line."""
        return self._read(self._jsonl_records, progress)

    def _jsonl_records(self, file: TextFile) -> Iterator[tuple[str, Any]]:
        for place, record in super()._jsonl_records(file):
            if isinstance(record, list):
                raise UserError(
                    f"{place} is a list, {str(record)[:40]}. Each line must be one conversation, an object."
                    f"{lines_hint('[', file)}"
                )
            yield place, record


@dataclass
class GivenConversations(ChatCorpus):
    """Conversations that are in memory, each as a line of a file would have it."""

    given: Sequence[Any] = field(default=(), kw_only=True)

    def records(self, progress: str = "") -> Iterator[tuple[str, Any]]:
        return ((f"conversation {i}", record) for i, record in enumerate(self.given, 1))


def _learned_bytes(line: ChatLine, read: Set[str]) -> int:
    """Count the bytes of what the assistant says, thinks and calls, as far as it is learned and the template reads it.

    A message that opens the conversation is no answer.
    """
    answered = list(zip(line.messages, line.learned, strict=True))[1:]
    return sum(
        len((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode())
        for message, learned in answered
        if learned and message["role"] == "assistant"
        for name, value in message.items()
        if value is not None and (name == "content" or (name in read and name != "role"))
    )


def write_conversations(
    train: ShardWriter, val: ShardWriter, corpus: ChatCorpus, tokenizer: Tokenizer, val_fraction: float
) -> dict[str, Any]:
    """Tokenize conversations into words, in the files of the two splits; return the entries of meta.json.

    Raises UserError when there are fewer than two conversations with an answer.
    """
    started = time.monotonic()
    period, files = max(2, round(1 / val_fraction)), (train, val)
    n_conversations, text_bytes = 0, 0
    n_words, n_targets, n_bytes = [0, 0], [0, 0], [0, 0]
    for conversation, texts in encoded(corpus, tokenizer, "tokens"):
        split = int(n_conversations % period == 1)  # the second conversation is held out, then one in each `period`
        n_conversations += 1
        n_bytes[split] += conversation.n_bytes
        text_bytes += sum(len(part.encode()) for parts in conversation.texts for part in parts)
        for words in texts:
            files[split].write(words.tobytes())
            n_words[split] += len(words)
            n_targets[split] += int(np.count_nonzero(words & LEARNED))
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
    say_what_was_read(corpus)
    return {
        "format": "chat",
        "word": "uint32: id in bits 0 to 29, bit 30: a conversation begins, bit 31: the token is learned",
        "dtype": "uint32",
        "train_targets": n_targets[0],  # learned tokens
        "val_targets": n_targets[1],
        "train_bytes": n_bytes[0],  # of the assistant's messages as UTF-8, for bits per byte
        "val_bytes": n_bytes[1],
        "n_documents": n_conversations,
        "unanswered_conversations": corpus.unanswered,
        "layouts": dict(corpus.layouts),
        "split": "conversation",
        "replaced_characters": corpus.replaced,
    }


def encoded(
    corpus: ChatCorpus, tokenizer: Tokenizer, progress: str = ""
) -> Iterator[tuple[Conversation, list[np.ndarray]]]:
    """Yield each conversation that has an answer, with the words of its texts. Raises UserError of the lines."""
    for batch in batched_by_characters(corpus.conversations(progress), Conversation.n_characters):
        ids = iter(tokenizer.encode_parts([parts for conversation in batch for parts in conversation.texts]))
        for conversation in batch:
            texts = [to_words(next(ids)) for _ in conversation.texts]
            assert all((words & IDS).max() < tokenizer.vocab_size for words in texts)
            yield conversation, texts


def say_what_was_read(corpus: ChatCorpus) -> None:
    """Log the layouts of the lines, once all are read, and what of them the model does not see or learn."""
    found = ", ".join(
        f"{layout} {n:,}" + (f" ({MEANING[layout]})" if layout in MEANING else "")
        for layout, n in corpus.layouts.most_common()
    )
    log.info("layout of the lines: %s", found or "there are none")
    if corpus.unanswered:
        log.warning(
            "%s conversations are left out: they hold no answer of the assistant to learn", f"{corpus.unanswered:,}"
        )
    if corpus.unread:
        names = ", ".join(f"{name} ({n:,})" for name, n in sorted(corpus.unread.items()))
        log.warning("the chat template does not read these fields, so the model does not see them: %s", names)
