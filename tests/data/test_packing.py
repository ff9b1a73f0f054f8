"""Packing loses nothing, fills rows well, and says what it had to cut."""

import numpy as np
import pytest

from jgpt.data import packing
from jgpt.data.packing import pack, pack_rows
from jgpt.data.words import to_words
from jgpt.errors import UserError


def conversation(asked: int, answered: int, id: int = 7) -> np.ndarray:
    return to_words([np.full(asked, id, np.uint32), np.full(answered, id, np.uint32)])


@pytest.mark.parametrize("capacity", [10, 64, 1025])
def test_every_item_is_in_one_row_that_holds_it(capacity: int) -> None:
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 700)
    order, first = pack(lengths, capacity)
    assert sorted(order) == list(range(700)) and first[0] == 0 and first[-1] == 700
    filled = np.add.reduceat(lengths[order], first[:-1])
    assert filled.max() <= capacity and (np.diff(first) > 0).all()
    assert len(filled) <= 11 / 9 * np.ceil(lengths.sum() / capacity) + 4
    assert (order == pack(lengths, capacity)[0]).all()


def test_an_item_goes_where_the_least_room_is_left() -> None:
    order, first = pack(np.array([6, 7, 3, 1, 2, 1]), 10)
    assert [order[a:b].tolist() for a, b in zip(first, first[1:], strict=False)] == [[1, 2], [0, 3, 4, 5]]
    assert [len(x) for x in pack(np.zeros(0, np.int64), 10)] == [0, 1]


def test_many_conversations_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 800, 100_000)
    _, first = pack(lengths, 2049)
    assert lengths.sum() / (2049 * (len(first) - 1)) > 0.99


def test_rows_hold_words_side_by_side_and_zeros_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SCAN_WORDS", 3)  # a conversation may begin anywhere in what is read at a time
    chats = [conversation(2, 2, 5), conversation(3, 3, 6), conversation(1, 1, 7)]
    rows = pack_rows(np.concatenate(chats), 9, "training", "length")
    assert len(rows) == 2
    words, numbers = rows.row(0)
    assert words.tolist() == [*chats[1], *chats[2], 0] and numbers.tolist() == [0] * 6 + [1] * 2 + [2]
    words, numbers = rows.row(1)
    assert words.tolist() == [*chats[0], *[0] * 5] and numbers.tolist() == [0] * 4 + [1] * 5


def test_long_conversations_are_cut_or_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    short, cut, left_out = conversation(2, 2), conversation(9, 5), conversation(10, 5)
    with caplog.at_level("INFO", "jgpt"):
        rows = pack_rows(np.concatenate([short, cut, left_out]), 10, "training", "length")
    assert "training: 2 conversations in 2 rows, 70% full" in caplog.text
    assert "2 conversations are longer than a sequence of 9 tokens: 1 are cut there, and 1 are left out" in caplog.text
    assert rows.row(0)[0].tolist() == cut[:10].tolist()
    caplog.clear()
    with pytest.raises(UserError, match="length is 9, and none of the 1 validation conversations .* 9 tokens"):
        pack_rows(left_out, 10, "validation", "length")
    with caplog.at_level("WARNING", "jgpt"):
        pack_rows(short, 4, "training", "length")
    assert not caplog.text
