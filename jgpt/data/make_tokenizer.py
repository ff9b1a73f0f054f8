"""Make the tokenizer that a config describes: trained on a sample of its text, or a published one.

In the data path: documents of `corpus.py` in, a `Tokenizer` out; `write_tokens.py` asks for it before it writes.
"""

import logging
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from jgpt.data.corpus import Corpus
from jgpt.data.published import load_pretrained
from jgpt.data.tokenizer import Tokenizer, train_bpe, train_char

MOST_NEW = 8_000_000  # bytes of different words to learn merges from: each takes about 80 bytes of memory
log = logging.getLogger("jgpt")
_WORDS = re.compile(r"[^\W\d]+|\d+|[^\w\s]+")  # about those of GPT-2's pre-tokenizer, to count them


def make_tokenizer(options: ConfigDict, corpus: Corpus) -> Tokenizer:
    """Train or load the tokenizer that config.tokenizer describes; training reads the corpus once."""
    if options.kind == "hf":
        return load_pretrained(options.pretrained)
    if options.kind == "char":
        return train_char(piece.text for piece in corpus.pieces("characters"))
    return train_bpe(_sample(corpus, options.training_megabytes * 1e6), options.vocab_size)


def _sample(corpus: Corpus, budget: float) -> Iterator[str]:
    """Yield about `budget` characters of text, spread evenly over a corpus, whether it is compressed or not.

    A trainer keeps every different word in memory. Where most words are different (no spaces, Chinese, random data) the
    sample is smaller, and the log says so; half of `MOST_NEW` is taken as it comes, and half is spread evenly.
    """
    taken, n_new, left_out, total = 0, 0, 0, max(corpus.n_bytes, 1)
    seen: set[int] = set()
    for piece in corpus.pieces("tokenizer"):
        done = corpus.bytes_read / total
        if taken > done * budget:
            continue
        if n_new > (1 + done) / 2 * MOST_NEW:
            left_out += len(piece.text)
            continue
        new = [word for word in set(_WORDS.findall(piece.text)) if hash(word) not in seen]
        seen.update(map(hash, new))
        n_new += sum(len(word.encode("utf-8", "surrogatepass")) for word in new)
        taken += len(piece.text)
        yield piece.text
    if left_out:
        log.warning(
            "tokenizer: learned from %.1f MB of text, because nearly all of its words are different: %.1f MB of them, "
            "and more do not fit in 1 GB of memory",
            *(taken / 1e6, n_new / 1e6),
        )
