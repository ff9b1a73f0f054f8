"""Draw the next token's id from its logits.

In the data path: called by `inference/rounds.py` for each new token, inside its compiled loop. Each filter takes fp32
logits [B, V] and returns them with the excluded ids at finfo.min. Ids with equal logits are kept or excluded together.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jgpt.errors import UserError

EXCLUDED = jnp.finfo(jnp.float32).min
MOST_IDS, LARGEST = 2**31 - 1, float(jnp.finfo(jnp.float32).max)  # larger values of rules mean the same


class Rules(NamedTuple):
    """The rules of each row of a batch, as arrays [B]: other values need no compilation. See `Sampling`."""

    temperature: Array | np.ndarray  # fp32
    top_k: Array | np.ndarray  # int32
    top_p: Array | np.ndarray  # fp32
    min_p: Array | np.ndarray  # fp32
    repetition_penalty: Array | np.ndarray  # fp32


@dataclass(frozen=True)
class Sampling:
    """The rules by which the next token is drawn.

    >>> Sampling(top_p=90).validate()
    Traceback (most recent call last):
    jgpt.errors.UserError: top_p=90. Allowed: above 0, at most 1. 1 keeps all ids, 0.9 the likeliest that add up to 90%.
    """

    temperature: float = 0.8  # divides the logits; 0: always the likeliest id (greedy)
    top_k: int = 50  # keep the k likeliest ids; 0: all
    top_p: float = 1.0  # keep the fewest likeliest ids that add up to this probability; 1: all
    min_p: float = 0.0  # keep the ids at least this share as likely as the likeliest; 0: all
    repetition_penalty: float = 1.0  # makes ids that are in the text less likely; 1: no change

    def validate(self) -> None:
        """Raise one UserError that names every field out of its range."""
        problems = [
            f"{name}={value!r}, of the type {type(value).__name__}. Allowed: a {'whole ' * (name == 'top_k')}number."
            for name, value in vars(self).items()
            if not isinstance(value, Integral if name == "top_k" else Real)
        ]
        if problems:
            raise UserError("\n".join(problems))
        # A temperature that fp32 rounds to 0 would divide by it.
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            allowed = "0, or 0.000001 and above"
            problems += [
                f"temperature={self.temperature}. Allowed: {allowed}. 0 is greedy, 1 the model's own distribution."
            ]
        if self.top_k < 0:
            problems += [f"top_k={self.top_k}. Allowed: 0 and above. 0 keeps all ids."]
        if not 0 < self.top_p <= 1:
            allowed = "above 0, at most 1"
            problems += [
                f"top_p={self.top_p}. Allowed: {allowed}. 1 keeps all ids, 0.9 the likeliest that add up to 90%."
            ]
        if not 0 <= self.min_p <= 1:
            problems += [f"min_p={self.min_p}. Allowed: 0 to 1. 0 keeps all ids, 0.05 is a usual choice."]
        if not 0.01 <= self.repetition_penalty <= 100:
            problems += [
                f"repetition_penalty={self.repetition_penalty}. Allowed: 0.01 to 100. 1 is none, 1.1 a usual choice."
            ]
        if problems:
            raise UserError("\n".join(problems))

    def rules(self, n_rows: int) -> Rules:
        """Return the same rules for each of `n_rows` rows."""

        def full(value: float) -> np.ndarray:
            return np.full(n_rows, min(value, LARGEST), np.float32)

        return Rules(
            temperature=full(self.temperature),
            top_k=np.full(n_rows, min(self.top_k, MOST_IDS), np.int32),
            top_p=full(self.top_p),
            min_p=full(self.min_p),
            repetition_penalty=full(self.repetition_penalty),
        )


def keep_top_k(logits: Array, k: Array | int) -> Array:
    """Keep the `k` likeliest ids; `k` is int32 [B], or one number for all rows.

    >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0]]), 2) > EXCLUDED
    Array([[False,  True,  True]], dtype=bool)
    """
    # The largest distance from the likeliest id that k ids do not exceed, by bisection over its bits: see keep_top_p.
    distance = jnp.max(logits, axis=-1, keepdims=True) - logits
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)
    wanted = jnp.reshape(k, (-1, 1))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        enough = jnp.sum(bits <= middle, axis=-1, keepdims=True) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    highest = jnp.max(bits, axis=-1, keepdims=True)
    _, most = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(highest), highest))
    return jnp.where(bits <= most, logits, EXCLUDED)


def keep_top_p(logits: Array, p: Array | np.ndarray | float) -> Array:
    """Keep the fewest likeliest ids that add up to probability `p`, at least one (Holtzman et al., arXiv 1904.09751).

    `p` is fp32 [B], or one number for all rows.

    >>> keep_top_p(jnp.log(jnp.array([[0.3, 0.1, 0.6]])), 0.8) > EXCLUDED
    Array([[ True, False,  True]], dtype=bool)
    """
    # An id is kept when all likelier ids add up to less than p. Find the smallest probability that is kept by bisection
    # over its bits, which have the order of the numbers. That takes 31 sums; sorting takes a CPU 20 times as long.
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)
    highest, wanted = jnp.max(bits, axis=-1, keepdims=True), jnp.reshape(p, (-1, 1))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        likelier = jnp.sum(jnp.where(bits > middle, probabilities, 0), axis=-1, keepdims=True)
        return jnp.where(likelier < wanted, low, middle + 1), jnp.where(likelier < wanted, middle, high)

    _, least = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(highest), highest))
    return jnp.where(bits >= least, logits, EXCLUDED)


def keep_min_p(logits: Array, p: Array | np.ndarray | float) -> Array:
    """Keep the ids at least `p` times as likely as the likeliest (Nguyen et al., arXiv 2407.01082).

    `p` is fp32 [B], or one number for all rows.

    >>> keep_min_p(jnp.log(jnp.array([[0.3, 0.1, 0.6]])), 0.2) > EXCLUDED
    Array([[ True, False,  True]], dtype=bool)
    """
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.reshape(p, (-1, 1)))
    return jnp.where(logits >= least, logits, EXCLUDED)


def penalize(logits: Array, seen: Array, penalty: Array | np.ndarray | float) -> Array:
    """Make the `seen` ids, bool [B, V], less likely (Keskar et al., arXiv 1909.05858).

    `penalty` is fp32 [B], or one number for all rows.

    >>> penalize(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 2.0)
    Array([[ 1., -4.,  2.]], dtype=float32)
    """
    penalty = jnp.reshape(penalty, (-1, 1))
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(keys: Array, logits: Array, rules: Rules, seen: Array | None = None) -> Array:
    """Draw one id for each row of fp32 `logits` [B, V], with the row's own key of `keys` [B]; return int32 [B].

    The rules apply in the order of transformers, each to the result of the one before: the penalty for `seen` ids (bool
    [B, V]), temperature, top_k, top_p, min_p. A rule that no row has is skipped when the program runs.

    >>> logits = jnp.array([[1.0, 3.0, 2.0]])
    >>> sample(jax.random.split(jax.random.key(0), 1), logits, Sampling(temperature=0).rules(1))
    Array([1], dtype=int32)
    """
    rules = Rules(*map(jnp.asarray, rules))
    if seen is not None:
        logits = penalize(logits, seen, rules.repetition_penalty)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    greedy = rules.temperature == 0
    drawn = jax.lax.cond(jnp.all(greedy), lambda: likeliest, lambda: _draw(keys, logits, rules))
    return jnp.where(greedy, likeliest, drawn)


def _draw(keys: Array, logits: Array, rules: Rules) -> Array:
    temperature = jnp.where(rules.temperature == 0, 1, rules.temperature)[:, None]
    # With the maximum subtracted, a low temperature cannot overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    k = jnp.where(rules.top_k > 0, rules.top_k, MOST_IDS)
    limited, cut, floored = rules.top_k > 0, rules.top_p < 1, rules.min_p > 0
    logits = jax.lax.cond(jnp.any(limited), lambda x: keep_top_k(x, k), lambda x: x, logits)
    # The row's own condition again: rounded sums of probabilities may be less than 1 before the last id.
    logits = jax.lax.cond(
        jnp.any(cut), lambda x: jnp.where(cut[:, None], keep_top_p(x, rules.top_p), x), lambda x: x, logits
    )
    logits = jax.lax.cond(jnp.any(floored), lambda x: keep_min_p(x, rules.min_p), lambda x: x, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
