"""Batches are a pure function of (seed, step), and an epoch repeats nothing."""

import threading
import time

import numpy as np
import pytest

from jgpt.config import UserError
from jgpt.data.batches import Batches, Prefetcher, block_offset, block_order, validation_blocks

TOKENS = np.arange(1003, dtype=np.uint16)


def batches(tokens: np.ndarray = TOKENS, seed: int = 1, size: int = 8, context: int = 10, vocab: int = 1003) -> Batches:
    return Batches(tokens, seed, size, context, vocab)


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
    forwards = [batches().batch(step) for step in range(30)]
    backwards = [batches().batch(step) for step in reversed(range(30))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert forwards[0].dtype == np.int32 and forwards[0].shape == (8, 11)
    assert not np.array_equal(forwards[0], batches(seed=2).batch(0))


@pytest.mark.parametrize("size", [1, 8, 250])  # 250: several epochs in one batch
def test_an_epoch_visits_every_block_once(size: int) -> None:
    data = batches(size=size)
    assert data.n_blocks == 99 and data.tokens_per_epoch == 990
    sequences = np.concatenate([data.batch(step) for step in range(-(-3 * 99 // size))])[: 3 * 99]
    epochs = sequences.reshape(3, 99, 11)
    for number, epoch in enumerate(epochs):
        starts = np.sort(epoch[:, 0])
        assert np.array_equal(starts, block_offset(1, number, 10) + 10 * np.arange(99))
        assert np.array_equal(epoch - epoch[:, :1], np.broadcast_to(np.arange(11), (99, 11)))
    assert len({block_offset(1, number, 10) for number in range(30)}) > 5


def test_the_sequence_does_not_depend_on_the_batch_size() -> None:
    small = np.concatenate([batches(size=4).batch(step) for step in range(20)])
    assert np.array_equal(small, np.concatenate([batches(size=16).batch(step) for step in range(5)]))


def test_the_last_window_fits() -> None:
    for n_tokens in range(20, 45):
        data = batches(TOKENS[:n_tokens])
        for step in range(40):
            assert data.batch(step).shape == (8, 11)


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"context_length is 10 and the training text has 19 tokens.*least 20"):
        batches(TOKENS[:19])
    with pytest.raises(UserError, match="context_length is 10 and the validation text has 10 tokens.*val_fraction"):
        validation_blocks(TOKENS[:10], 10, 4)
    with pytest.raises(UserError, match=r"hold the id \d+, and the vocabulary ends at 9\b"):
        batches(vocab=10).batch(0)


def test_validation_blocks_are_spread_evenly() -> None:
    everything = validation_blocks(TOKENS, 10, 1000)
    assert everything.dtype == np.int32 and everything.shape == (100, 11)
    assert np.array_equal(everything[:, :-1].ravel(), TOKENS[:1000])
    assert np.array_equal(everything[:, 1:].ravel(), TOKENS[1:1001])
    some = validation_blocks(TOKENS, 10, 7)
    assert some.shape == (7, 11) and set(np.diff(some[:, 0])) <= {140, 150}
    assert validation_blocks(TOKENS[:11], 10, 7).shape == (1, 11)


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
    before = threading.active_count()
    started = time.monotonic()
    with Prefetcher(lambda step: time.sleep(0.05), first_step=0, depth=100) as prefetcher:
        prefetcher.next(0)
    assert time.monotonic() - started < 2
    assert threading.active_count() == before
