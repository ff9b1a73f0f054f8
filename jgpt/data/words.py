"""Words: token ids of conversations, with marks for what is learned.

In the data path: `conversations.py` makes them; the token files hold them, and `packing.py` and `batches.py` read them.

A word is a uint32: the id in bits 0 to 29; bit 31 where the token is learned, which is what the assistant wrote with
its end of turn; bit 30 where a conversation begins. Conversations follow one another without a gap.
"""

import numpy as np

LEARNED, BEGINS = np.uint32(1 << 31), np.uint32(1 << 30)
IDS = np.uint32(BEGINS - 1)


def to_words(parts: list[np.ndarray]) -> np.ndarray:
    """Join the ids of a text's parts to words, uint32; every second part is learned.

    >>> [hex(word) for word in to_words([np.uint32([1, 2]), np.uint32([3])])]
    ['0x40000001', '0x2', '0x80000003']
    """
    words = np.concatenate([ids | LEARNED if i % 2 else ids for i, ids in enumerate(parts)])
    words[0] |= BEGINS
    return words
