"""Rotary position embedding (RoPE), and the ways in which pretrained models extend it to longer texts.

In the data path: rotates queries and keys in every block (`block.py`). The legend of `gpt.py` names the dimensions.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class RopeScaling:
    """How a model's frequencies differ from the plain ones."""

    kind: str = "none"  # or "linear", "llama3", "yarn"
    factor: float = 1.0
    original_context_length: int = 0  # of the model before its context was extended
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: frequencies that turn more often than this in the original context stay
    beta_slow: float = 1.0  # yarn: those that turn less often are divided by `factor`
    attention_factor: float = 0.0  # yarn: multiplies cosine and sine; 0: 0.1 ln(factor) + 1


def frequencies(d_head: int, theta: float, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Return the angle of each pair at position 1, in radians, fp32 [H/2], and the factor of cosine and sine.

    Sources: Su et al., arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; llama3: the Llama 3.1 release;
    yarn: Peng et al., arXiv 2309.00071.

    >>> frequencies(4, 10_000.0, RopeScaling())[0].tolist()
    [1.0, 0.009999999776482582]
    """
    s, half = scaling, d_head // 2
    plain = theta ** (-np.arange(half, dtype=np.float64) / half)
    if s.kind == "linear":
        return (plain / s.factor).astype(np.float32), 1.0
    if s.kind == "llama3":
        turns = s.original_context_length * plain / (2 * math.pi)  # in the original context
        share = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    elif s.kind == "yarn":

        def pair(turns: float) -> float:
            """Return the index, a real number, of the pair that makes so many turns in the original context."""
            return d_head * math.log(s.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair(s.beta_fast)), 0)
        high = min(math.ceil(pair(s.beta_slow)), d_head - 1)
        share = 1 - np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1)
    else:
        return plain.astype(np.float32), 1.0
    mixed = plain * share + plain / s.factor * (1 - share)
    factor = (s.attention_factor or 0.1 * math.log(s.factor) + 1) if s.kind == "yarn" else 1.0
    return mixed.astype(np.float32), factor


def rope(x: Array, positions: Array, theta: float, scaling: RopeScaling = RopeScaling()) -> Array:
    """Rotate the pairs of each head by angles that grow with the position.

    As in Llama, element i is paired with element i + H/2. `x` [B, T, ..., H], `positions` int32 [B or 1, T]. Computed
    in fp32, returned in the shape and dtype of `x`.
    """
    radians, factor = frequencies(x.shape[-1], theta, scaling)
    angles = positions.astype(jnp.float32)[..., None] * radians[None, None, :]  # [B, T, H/2]
    angles = jnp.expand_dims(angles, range(2, x.ndim - 1))
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
