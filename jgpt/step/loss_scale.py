"""Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740).

In the data path: inside the step, after the gradients are known to be finite or not.
"""

import jax.numpy as jnp
from jax import Array

from jgpt.step.state import LossScale

MAX_LOSS_SCALE = 2.0**24


def next_loss_scale(old: LossScale, finite: Array, growth_steps: int) -> LossScale:
    """Halve the scale after an overflow, double it after `growth_steps` good steps (0: leave it alone)."""
    good_steps = jnp.where(finite, old.good_steps + 1, 0)
    scale = old.scale
    if growth_steps:
        grow = good_steps >= growth_steps
        scale = jnp.where(grow, jnp.minimum(scale * 2, MAX_LOSS_SCALE), scale)
        scale = jnp.where(finite, scale, jnp.maximum(old.scale / 2, 1.0))
        good_steps = jnp.where(grow, 0, good_steps)
    return LossScale(
        scale=scale,
        good_steps=good_steps,
        skipped_steps=old.skipped_steps + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, old.skipped_in_a_row + 1),
    )
