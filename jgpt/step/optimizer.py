"""The optimizer: averaged gradients in, parameter updates out.

In the data path: inside the step, after the accumulated gradients have been averaged over the devices.
"""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def learning_rate_schedule(optimizer: ConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the updates made: linear warmup to the peak, cosine to the minimum.

    The first update is one step up from zero already, so that it does something.

    Source: Loshchilov and Hutter, arXiv 1608.03983; warmup as in GPT-2 and nanoGPT.

    >>> from jgpt.config import default_config
    >>> schedule = learning_rate_schedule(default_config().optimizer)
    >>> [round(float(schedule(step)), 6) for step in (0, 50, 100, 550, 1000)]
    [1e-05, 0.000505, 0.001, 0.00055, 0.0001]
    """
    if optimizer.warmup_steps == 0:
        alpha = optimizer.min_learning_rate / optimizer.learning_rate
        return optax.cosine_decay_schedule(optimizer.learning_rate, optimizer.total_steps, alpha)
    return optax.warmup_cosine_decay_schedule(
        init_value=optimizer.learning_rate / (optimizer.warmup_steps + 1),
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=optimizer.total_steps,  # warmup included
        end_value=optimizer.min_learning_rate,
    )


def make_optimizer(optimizer: ConfigDict) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter, arXiv 1711.05101) behind a clip of the gradient's global norm.

    Weight decay falls on matrices and embeddings only, as in GPT-2: norms and biases are kept free.
    """
    adamw = optax.adamw(
        learning_rate_schedule(optimizer),
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decayed,
    )
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return optax.chain(clip, adamw)


def decayed(params: Any) -> Any:
    """Mark the parameters that weight decay acts on: kernels, embeddings and LoRA's a and b, never a bias or a norm."""
    names = ("kernel", "embedding", "a", "b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)
