"""Batches are a pure function of (seed, step), and an epoch repeats nothing."""

import threading
import time

import numpy as np
import pytest

from jgpt.data.batches import Batch, Batches, ChatBatches, block_offset, block_order, make_batches, validation_blocks
from jgpt.data.prefetch import Prefetcher
from jgpt.data.token_files import TokenData
from jgpt.data.tokenizer import train_char
from jgpt.data.words import to_words
from jgpt.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint16)


def batches(tokens: np.ndarray = TOKENS, seed: int = 1, size: int = 8, length: int = 10, vocab: int = 1003) -> Batches:
    return Batches(tokens, seed, size, length, vocab)


def token_data(train: np.ndarray, val: np.ndarray, format: str = "text") -> TokenData:
    return TokenData(train, val, {"format": format}, train_char("abc"))


def test_the_order_is_a_permutation_that_never_changes() -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(block_order(7, epoch, 1000)), np.arange(1000))
    assert not np.array_equal(block_order(7, 0, 1000), block_order(7, 1, 1000))
    assert not np.array_equal(block_order(7, 0, 1000), block_order(8, 0, 1000))
    # Written down once: another numpy or another machine must go on with the same batches.
    assert block_order(1337, 2, 10).tolist() == [4, 3, 6, 1, 7, 0, 9, 8, 2, 5]
    assert [block_offset(1337, epoch, 1024) for epoch in range(4)] == [777, 410, 255, 366]
    with pytest.raises(ValueError, match="read-only"):
        block_order(7, 0, 1000)[0] = 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forwards = [batches().batch(step).tokens for step in range(30)]
    backwards = [batches().batch(step).tokens for step in reversed(range(30))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert forwards[0].dtype == np.int32 and forwards[0].shape == (8, 11)
    assert not np.array_equal(forwards[0], batches(seed=2).batch(0).tokens)
    assert batches().batch(0)[1:] == (None, None)  # no weights, no segments


@pytest.mark.parametrize("size", [1, 8, 250])  # 250: several epochs in one batch
def test_an_epoch_visits_every_block_once(size: int) -> None:
    data = batches(size=size)
    assert data.n_blocks == 99 and data.tokens_per_epoch == 990
    sequences = np.concatenate([data.batch(step).tokens for step in range(-(-3 * 99 // size))])[: 3 * 99]
    epochs = sequences.reshape(3, 99, 11)
    for number, epoch in enumerate(epochs):
        starts = np.sort(epoch[:, 0])
        assert np.array_equal(starts, block_offset(1, number, 10) + 10 * np.arange(99))
        assert np.array_equal(epoch - epoch[:, :1], np.broadcast_to(np.arange(11), (99, 11)))
    assert len({block_offset(1, number, 10) for number in range(30)}) > 5


def test_the_sequence_does_not_depend_on_the_batch_size() -> None:
    small = np.concatenate([batches(size=4).batch(step).tokens for step in range(20)])
    assert np.array_equal(small, np.concatenate([batches(size=16).batch(step).tokens for step in range(5)]))


def test_the_last_window_fits() -> None:
    for n_tokens in range(20, 45):
        data = batches(TOKENS[:n_tokens])
        for step in range(40):
            assert data.batch(step).tokens.shape == (8, 11)


def test_bad_tokens_are_refused() -> None:
    short, key = token_data(TOKENS[:19], TOKENS[:10]), "batch.sequence_length"
    with pytest.raises(UserError, match=f"{key} is 10, and the training text has 19 tokens.*least 20.* smaller {key}"):
        make_batches(short, 1, 8, 10, 1003, length_key=key)
    with pytest.raises(UserError, match=f"{key} is 10, and the validation text has 10 tokens.*{key} or .*val_fraction"):
        validation_blocks(short, 10, 4, length_key=key)
    with pytest.raises(UserError, match=r"hold the id \d+. Allowed: 0 to 9\b"):
        batches(vocab=10).batch(0)


def test_validation_blocks_are_spread_evenly() -> None:
    def blocks(n_tokens: int, at_most: int) -> np.ndarray:
        data = token_data(TOKENS, TOKENS[:n_tokens])
        return np.stack([block.tokens for block in validation_blocks(data, 10, at_most, length_key="length")])

    everything = blocks(1003, 1000)
    assert everything.dtype == np.int32 and everything.shape == (100, 11)
    assert np.array_equal(everything[:, :-1].ravel(), TOKENS[:1000])
    assert np.array_equal(everything[:, 1:].ravel(), TOKENS[1:1001])
    some = blocks(1003, 7)
    assert some.shape == (7, 11) and set(np.diff(some[:, 0])) <= {140, 150}
    assert blocks(11, 7).shape == (1, 11)


def conversations(n: int, longest: int = 9) -> list[np.ndarray]:
    """Return the words of conversations of one turn, every id of its own."""
    random, id, words = np.random.default_rng(n), 1, []
    for _ in range(n):
        asked, answered = random.integers(1, longest, 2)
        ids = np.arange(id, id + asked + answered, dtype=np.uint32)
        words.append(to_words([ids[:asked], ids[asked:]]))
        id += len(ids)
    return words


def chat_batches(words: list[np.ndarray], seed: int = 1, size: int = 4, length: int = 19) -> Batches | ChatBatches:
    data = token_data(np.concatenate(words), words[0], "chat")
    return make_batches(data, seed, size, length, 10_000, length_key="batch.sequence_length")


def texts(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Take rows apart by their segments: each text's ids, and those that count."""
    taken = []
    for tokens, weights, segments in zip(*batch, strict=True):
        for number in range(segments.max() + 1):
            inputs = np.flatnonzero(segments == number)
            reach = np.append(inputs, inputs[-1] + 1)  # the last target of a row is no input
            counted = [int(tokens[i + 1]) for i in inputs if weights[i]]
            taken.append(([int(i) for i in tokens[reach]], counted))
    return taken


@pytest.mark.parametrize("size", [1, 4, 50])
def test_an_epoch_has_every_conversation_once_and_learns_its_answer(size: int) -> None:
    chats = conversations(100)
    data = chat_batches(chats, size=size)
    assert isinstance(data, ChatBatches) and data.tokens_per_epoch == 19 * data.n_blocks
    rows = [data._row(index) for index in range(2 * data.n_blocks)]
    orders = []
    for epoch in (rows[: data.n_blocks], rows[data.n_blocks :]):
        orders.append([tuple(row.tokens) for row in epoch])
        seen = {ids[0]: (ids, counted) for row in epoch for ids, counted in texts(Batch(*(x[None] for x in row)))}
        for words in chats:
            ids, counted = seen.pop(int(words[0] & 0xFFFF))
            expected = (words & 0xFFFF).tolist()
            assert ids[: len(expected)] == expected
            assert counted == (words[words >> 31 == 1] & 0xFFFF).tolist()
        assert set(seen) <= {0}  # the padding
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_conversations_fill_whole_batches_of_any_size_in_one_order() -> None:
    chats = conversations(80)
    small, large = chat_batches(chats, size=4), chat_batches(chats, size=16)
    for step in (0, 7):
        parts = [chat_batches(chats, size=4).batch(4 * step + i) for i in range(4)]  # no state to resume
        whole = large.batch(step)
        assert np.array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))
        assert np.array_equal(whole.segments, np.concatenate([part.segments for part in parts]))
        assert np.array_equal(whole.weights > 0, np.concatenate([part.weights > 0 for part in parts]))
    again = small.batch(0)
    assert again.tokens.dtype == again.segments.dtype == np.int32 and again.weights.dtype == np.float32
    assert again.tokens.shape == (4, 20) and again.weights.shape == again.segments.shape == (4, 19)
    assert not np.array_equal(again.tokens, chat_batches(chats, seed=2).batch(0).tokens)


def test_weights_average_to_one_so_that_learned_targets_average_to_their_mean() -> None:
    batch = chat_batches(conversations(60), size=8).batch(0)
    losses = np.random.default_rng(0).random(batch.weights.shape)
    assert batch.weights.mean() == pytest.approx(1, rel=1e-6) and len(np.unique(batch.weights)) == 2
    shares = (batch.weights * losses).reshape(2, 2, 2, 19)  # devices, micro-batches
    assert np.mean([[part.mean() for part in share] for share in shares]) == pytest.approx(
        losses[batch.weights > 0].mean(), rel=1e-6
    )


def test_validation_rows_are_those_of_the_conversations() -> None:
    chats = conversations(40)
    data = token_data(chats[0], np.concatenate(chats), "chat")
    everything = validation_blocks(data, 19, 1000, length_key="length")
    assert sum(row.weights.sum() for row in everything) == sum((words >> 31).sum() for words in chats)
    assert all(set(row.weights) <= {0, 1} and len(row.tokens) == 20 for row in everything)
    assert len(validation_blocks(data, 19, 7, length_key="length")) == 7


def test_bad_conversations_are_refused() -> None:
    data = token_data(np.concatenate(conversations(20)), np.zeros(0, np.uint32), "chat")
    with pytest.raises(UserError, match=r"hold the id \d+. Allowed: 0 to 9\b"):
        make_batches(data, 1, 4, 19, 10, length_key="length").batch(0)
    late = [to_words([np.uint32([1, 2, 3]), np.uint32([4])])] * 20
    with pytest.raises(UserError, match="length is 1, and none of the 20 training conversations has an answer"):
        chat_batches(late, length=1)


def test_prefetcher_hands_out_steps_in_order_and_works_ahead() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with Prefetcher(make, first_step=5, depth=3) as prefetcher:
        assert [prefetcher.next(step) for step in range(5, 25)] == [step * step for step in range(5, 25)]
        with pytest.raises(AssertionError, match="25 is next"):
            prefetcher.next(7)
    assert made[:20] == list(range(5, 25)) and len(made) <= 23


def test_prefetcher_raises_what_the_thread_raised() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise UserError("the disk is gone")
        return step

    with Prefetcher(make, first_step=0) as prefetcher:
        assert [prefetcher.next(0), prefetcher.next(1)] == [0, 1]
        with pytest.raises(UserError, match="the disk is gone"):
            prefetcher.next(2)


def test_prefetcher_closes_promptly() -> None:
    before, made = threading.active_count(), []
    with Prefetcher(lambda step: (time.sleep(0.01), made.append(step)), first_step=0, depth=2_000) as prefetcher:
        prefetcher.next(0)
    assert threading.active_count() == before and len(made) < 1_000  # not all that there is room for
