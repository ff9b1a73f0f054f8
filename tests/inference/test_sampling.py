"""Sampling rules against their one-line numpy forms, and the distribution that comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.inference.sampling import EXCLUDED, Rules, Sampling, keep_min_p, keep_top_k, keep_top_p, penalize, sample

compiled_sample = jax.jit(sample)  # as decoding has it; op by op each call compiles its branches again
LOGITS = np.random.default_rng(0).normal(0, 3, (7, 50)).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(filtered) -> np.ndarray:
    filtered = np.asarray(filtered)
    np.testing.assert_array_equal(filtered[filtered != EXCLUDED], LOGITS[filtered != EXCLUDED])
    return filtered != EXCLUDED


def draw(n: int, logits, sampling: Sampling, seed: int = 0) -> np.ndarray:
    """Draw n ids from one row of logits."""
    keys = jax.random.split(jax.random.key(seed), n)
    return np.asarray(compiled_sample(keys, jnp.tile(jnp.asarray(logits), (n, 1)), sampling.rules(n)))


@pytest.mark.parametrize("k", [1, 2, 17, 50, 1000])
def test_top_k(k: int):
    np.testing.assert_array_equal(kept(keep_top_k(LOGITS, k)), (-LOGITS).argsort().argsort() < k)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.998])
def test_top_p(p: float):
    """Kept where the ids that are likelier add up to less than p."""
    probabilities = softmax(LOGITS)
    likelier = (probabilities[:, None, :] * (LOGITS[:, None, :] > LOGITS[:, :, None])).sum(-1)
    np.testing.assert_array_equal(kept(keep_top_p(jnp.asarray(LOGITS), p)), likelier < p)


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 1.0])
def test_min_p(p: float):
    probabilities = softmax(LOGITS)
    np.testing.assert_array_equal(
        kept(keep_min_p(LOGITS, p)), probabilities >= p * probabilities.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty(penalty: float):
    seen = np.random.default_rng(1).random(LOGITS.shape) < 0.3
    expected = np.where(seen, np.where(LOGITS > 0, LOGITS / np.float32(penalty), LOGITS * np.float32(penalty)), LOGITS)
    np.testing.assert_allclose(penalize(jnp.asarray(LOGITS), jnp.asarray(seen), penalty), expected, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    greedy = sample(
        keys, jnp.asarray(LOGITS), Sampling(0, repetition_penalty=penalty).rules(len(LOGITS)), jnp.asarray(seen)
    )
    np.testing.assert_array_equal(greedy, expected.argmax(-1))


def test_equal_logits_stay_together():
    tied = jnp.zeros((1, 6)).at[0, 4].set(-1)
    for filtered in (keep_top_k(tied, 2), keep_top_p(tied, 0.3), keep_min_p(tied, 0.9)):
        np.testing.assert_array_equal(np.asarray(filtered)[0] != EXCLUDED, [True, True, True, True, False, True])


@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(1, top_k=1), Sampling(1, 0, top_p=1e-6), Sampling(1, 0, 1, 1)]
)
def test_greedy_by_every_road(sampling: Sampling):
    keys = jax.random.split(jax.random.key(1), len(LOGITS))
    np.testing.assert_array_equal(sample(keys, jnp.asarray(LOGITS), sampling.rules(len(LOGITS))), LOGITS.argmax(-1))


def test_each_row_has_its_own_rules():
    """One call for rows of different rules draws what a call for each of them draws."""
    rules = [
        Sampling(0),
        Sampling(1, 3),
        Sampling(2, 0, 0.9),
        Sampling(1, 0, 1, 0.2),
        Sampling(1, 0),
        Sampling(5, 9, 0.5),
    ]
    rules += [Sampling(1, 0, repetition_penalty=3.0)]
    seen = jnp.asarray(np.random.default_rng(1).random((len(rules), 50)) < 0.3)
    together = Rules(*map(np.concatenate, zip(*(one.rules(1) for one in rules), strict=True)))
    logits = jnp.asarray(LOGITS)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(rules))
        alone = [
            compiled_sample(keys[b : b + 1], logits[b : b + 1], one.rules(1), seen[b : b + 1])[0]
            for b, one in enumerate(rules)
        ]
        assert compiled_sample(keys, logits, together, seen).tolist() == [int(token) for token in alone]


def test_extreme_temperatures_stay_finite():
    assert set(draw(50, 1e4 * LOGITS[:1], Sampling(1e-6, 0))) == {LOGITS[0].argmax()}
    assert len(set(draw(500, LOGITS[:1], Sampling(1e6, 0)))) == 50


def test_frequencies_are_the_probabilities():
    n, sampling = 20_000, Sampling(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01)
    logits = LOGITS[0] / 1.5
    allowed = logits >= np.sort(logits)[-20]
    for keep in (keep_top_p, keep_min_p):
        p = sampling.top_p if keep is keep_top_p else sampling.min_p
        allowed &= np.asarray(keep(jnp.where(allowed, logits, EXCLUDED)[None], p))[0] != EXCLUDED
    expected = softmax(np.where(allowed, logits, -np.inf))
    frequencies = np.bincount(draw(n, LOGITS[:1], sampling), minlength=50) / n
    assert 2 < allowed.sum() < 20
    assert frequencies[~allowed].sum() == 0
    np.testing.assert_array_less(abs(frequencies - expected), 5 * np.sqrt(expected / n) + 1e-12)


def test_seed_decides():
    first, again, other = (draw(20, LOGITS[:1], Sampling(1.0, 0), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    "sampling",
    [
        *(Sampling(-1), Sampling(1e-40), Sampling(float("nan")), Sampling(top_k=-1), Sampling(top_p=0)),
        *(Sampling(min_p=1.1), Sampling("hot"), Sampling(top_k=2.5), Sampling(top_p=[0.5]), Sampling(min_p=None)),
    ],
)
def test_out_of_range(sampling: Sampling):
    with pytest.raises(UserError, match="Allowed: "):
        sampling.validate()


def test_all_problems_at_once():
    with pytest.raises(UserError) as error:
        Sampling(-1, -1, -1, -1, -1).validate()
    rules = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == rules
