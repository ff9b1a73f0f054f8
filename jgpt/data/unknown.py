"""Name the characters of a text that a vocabulary lacks: the model sees each of them as the same token, <unk>.

In the data path: beside `tokenizer.py`. Tokenizers of kind char lack all characters that their text did not have; those
that know all bytes lack none.
"""

from collections import Counter

import numpy as np

from jgpt.data.tokenizer import Tokenizer

MOST_NAMED = 10


def unknown_characters(tokenizer: Tokenizer, text: str, ids: np.ndarray | None = None) -> Counter[str]:
    """Count the characters of a text that the tokenizer has no token for; `ids` are the text's, where they are known.

    >>> from jgpt.data.tokenizer import train_char
    >>> unknown_characters(train_char(["abc"]), "a cab, a cab")
    Counter({' ': 3, ',': 1})
    """
    if not text:
        return Counter()
    unknown = tokenizer.backend.token_to_id(tokenizer.settings.get("unk_token") or "")
    if unknown is None or unknown not in (tokenizer.encode(text) if ids is None else ids):
        return Counter()
    counts = Counter(text)
    return Counter({c: n for c, n in counts.items() if unknown in tokenizer.encode(c)})


def name_unknown(unknown: Counter[str], what: str) -> str:
    """Say which characters of `what` are unknown, the most frequent ones first; "" where there are none.

    >>> print(name_unknown(Counter({"!": 2, "7": 1}), "the prompt"))
    3 characters of the prompt are not in the model's vocabulary, which sees each as <unk>: '!' (2), '7' (1)
    """
    if not unknown:
        return ""
    named = ", ".join(f"{c!r} ({n:,})" for c, n in unknown.most_common(MOST_NAMED))
    more = f", and {len(unknown) - MOST_NAMED:,} others" if len(unknown) > MOST_NAMED else ""
    n = unknown.total()
    subject = f"{n:,} characters of {what} are" if n > 1 else f"1 character of {what} is"
    return f"{subject} not in the model's vocabulary, which sees each as <unk>: {named}{more}"
