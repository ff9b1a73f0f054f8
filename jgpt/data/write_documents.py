"""Tokenize plain text into token files. (Conversations: `conversations.py`.)

In the data path: the loop of `write_tokens.py`, from `corpus.py` through `tokenizer.py` to `write_shards.py`.
"""

import logging
import time
from typing import Any

import numpy as np

from jgpt.data.corpus import Corpus
from jgpt.data.pieces import batched_by_characters
from jgpt.data.tokenizer import Tokenizer
from jgpt.data.write_shards import ShardWriter

log = logging.getLogger("jgpt")


def write_documents(
    train: ShardWriter, val: ShardWriter, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float, label: str
) -> dict[str, Any]:
    """Tokenize plain text into ids, with an end-of-text id after each document; return what is said of them.

    One document in each 1 / val_fraction is for validation.
    """
    started = time.monotonic()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    end_of_text = np.array([tokenizer.eot_id], dtype).tobytes()
    period = max(2, round(1 / val_fraction)) if val_fraction else 0
    n_documents, text_bytes, files = 0, [0, 0], (train, val)
    for batch in batched_by_characters(corpus.pieces(label), lambda piece: len(piece.text)):
        all_ids = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, all_ids, strict=True):
            assert ids.max(initial=0) < tokenizer.vocab_size
            split = int(period > 0 and piece.number % period == period - 1)
            files[split].write(ids.astype(dtype).tobytes() + end_of_text * piece.ends_document)
            text_bytes[split] += len(piece.text.encode())
            n_documents += piece.ends_document
    total, total_bytes = (train.n_bytes + val.n_bytes) // dtype.itemsize, sum(text_bytes)
    seconds = time.monotonic() - started
    log.info(
        "%s: files %d, documents %s, %.1f MB at %.1f MB/s: %s tokens, %.2f bytes a token, %.1f s%s",
        *(label, len(corpus.files), f"{n_documents:,}", total_bytes / 1e6, total_bytes / 1e6 / seconds),
        *(f"{total:,}", total_bytes / max(total, 1), seconds, corpus.remarks()),
    )
    return {
        "format": "text",
        "dtype": dtype.name,
        "train_bytes": text_bytes[0],  # of text as UTF-8, for bits per byte
        "val_bytes": text_bytes[1],
        "n_documents": n_documents,
        "replaced_characters": corpus.replaced,
    }
