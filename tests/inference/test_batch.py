"""Rows that come and go in one batch: each gets the ids that it would get alone."""

import random
from dataclasses import replace

import jax.numpy as jnp
import pytest
from test_decode import GREEDY, LLAMA, MODELS, N_IDS, RANDOM, fast, params_of

from jgpt.inference import batch as batch_module
from jgpt.inference.batch import Batch, Row
from jgpt.inference.rounds import compilations
from jgpt.inference.sampling import Sampling
from jgpt.model.gpt import GPT

PENALTY = Sampling(0.9, 0, 1.0, 0.01, 1.3)


def make(name: str = "llama", most_rows: int = 4, **how) -> Batch:
    how = dict(n_ids=N_IDS, most_stop_ids=2) | how
    return Batch(MODELS[name], {"params": params_of(name)}, most_rows=most_rows, **how)


def drain(batch: Batch, steps: int = 999) -> dict[Row, tuple[list[int], str]]:
    found: dict[Row, tuple[list[int], str]] = {}
    for _ in range(steps):
        for row, ids, end, error in batch.step():
            assert not error and not found.get(row, ([], ""))[1], "news of a row that has ended"
            found[row] = (found.get(row, ([], ""))[0] + ids, end)
        if not len(batch):
            break
    return found


def alone(row: Row, name: str = "llama") -> list[int]:
    """Return what `generate` writes. A long text beside it changes nothing (test_decode.py), and few sizes compile."""
    prompts = [[1] * 23, [1] * 23]
    prompts[row.number] = row.ids[: row.n_prompt]  # the number decides the random numbers, too
    return fast(name, prompts, row.sampling, row.max_new_tokens, row.seed, row.stop_ids)[row.number]


def rows_of_all_kinds(n: int, slides: bool) -> list[Row]:
    at, rows = random.Random(5), []
    for i in range(n):
        prompt = [at.randrange(N_IDS) for _ in range(at.choice([1, 3, 9, 17, 23]))]
        most = at.randrange(1, 40 if slides else 25 - len(prompt))
        stops = tuple(at.sample(range(N_IDS), at.randrange(3)))
        rules = at.choice([GREEDY, RANDOM, PENALTY])
        rows.append(Row(prompt, most, rules, seed=i, number=i % 2, stop_ids=stops, slides=slides))
    return rows


@pytest.mark.parametrize("slides", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_that_come_and_go_get_what_they_get_alone(name: str, slides: bool, monkeypatch: pytest.MonkeyPatch):
    """The context is 24: some rows fill it, and the cache grows from 16 to 24."""
    monkeypatch.setattr(batch_module, "SMALLEST_CACHE", 16)
    at, batch, found = random.Random(1), make(name), {}
    waiting = rows_of_all_kinds(14, slides)
    rows = list(waiting)
    while waiting or len(batch):
        while waiting and not batch.is_full and at.random() < 0.6:
            batch.add(waiting.pop())
        for row, ids, end, error in batch.step():
            found[row] = (found.get(row, ([], ""))[0] + ids, end)
            assert not error
    for row in rows:
        expected = alone(row, name)
        ids, end = found[row]
        assert ids == expected
        assert end == ("length" if len(expected) == row.max_new_tokens else "stop")


def test_a_row_that_is_removed_frees_its_place_and_disturbs_no_other():
    batch, endless = make(most_rows=2), Row([5], 20, GREEDY)
    batch.add(endless)
    other = Row([7, 8], 12, RANDOM, seed=3)
    batch.add(other)
    assert batch.is_full
    assert {row for row, *_ in batch.step()} == {endless, other}
    batch.remove(endless)
    batch.remove(endless)
    assert not batch.is_full
    third = Row([9, 9, 9], 6, RANDOM, seed=4)
    batch.add(third)
    found = drain(batch)
    assert endless not in found and found[third] == (alone(third), "length")
    assert other.ids[2:] == alone(other) and endless.n_new == 1


def test_a_row_that_may_not_slide_ends_where_the_context_does():
    batch, row = make(), Row([1] * 20, 30, GREEDY)
    batch.add(row)
    assert drain(batch)[row] == (alone(replace(row, max_new_tokens=5)), "length")


def test_broken_logits_end_their_row_alone(monkeypatch: pytest.MonkeyPatch):
    """A model whose embedding of one id is NaN: the row that draws or holds it ends, the other goes on."""
    params = dict(params_of("llama"))
    embedding = params["wte"]["embedding"]
    params["wte"] = {"embedding": embedding.at[3].set(jnp.nan)}
    batch = Batch(GPT(LLAMA), {"params": params}, n_ids=N_IDS, most_rows=4, most_stop_ids=1)
    broken, good = Row([1, 3], 5, GREEDY), Row([1, 2], 5, GREEDY)
    batch.add(broken)
    batch.add(good)
    found: dict[Row, str] = {}
    while len(batch):
        for row, _, end, error in batch.step():
            found[row] = end
            assert ("inf or NaN" in error) == (row is broken)
    assert found == {broken: "error", good: "length"} and good.n_new == 5


def test_other_requests_compile_nothing():
    def go(rows: list[Row]) -> None:
        batch = make()
        for row in rows:
            batch.add(row)
            batch.step()
        drain(batch)

    go([Row([1] * 3, 9, RANDOM), Row([2] * 3, 9, RANDOM), Row([3] * 3, 9, RANDOM)])
    before = compilations()
    go([Row([1] * 5, 7, GREEDY, 5, stop_ids=(1, 2)), Row([2] * 9, 3, PENALTY), Row([3], 14, Sampling(1, 0, 0.5))])
    assert compilations() == before
