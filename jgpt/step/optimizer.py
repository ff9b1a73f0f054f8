"""The optimizer: averaged gradients in, parameter updates out.

In the data path: inside the step, after the accumulated gradients have been averaged over the devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from jgpt.config.key import LARGEST_INT
from jgpt.model.matrices import is_matrix
from jgpt.model.parameters import path_names
from jgpt.model.precision import Policy
from jgpt.step.muon import scale_by_muon

FP32 = Policy()


def learning_rate_schedule(optimizer: ConfigDict) -> optax.Schedule:
    """Return the learning rate as a function of the updates made: linear warmup to the peak, then down to the minimum.

    The first update is one step up from zero already, so that it does something. "cosine" falls from the warmup's end
    on. "wsd" stays at the peak, and falls in the last `decay_fraction` of the steps: so what comes before the decay
    does not depend on `total_steps`. Neither does the warmup, in which `total_steps` may not be known yet (0).

    Sources: Loshchilov and Hutter, arXiv 1608.03983, for the cosine, with a warmup as in GPT-2 and nanoGPT. Haegele et
    al., arXiv 2405.18392, for the shape of the decay, 1 - sqrt, which ended lower than a linear one there.

    >>> from jgpt.config import default_config
    >>> schedule = learning_rate_schedule(default_config().optimizer)
    >>> [round(float(schedule(step)), 6) for step in (0, 50, 100, 550, 1000)]
    [1e-05, 0.000505, 0.001, 0.00055, 0.0001]
    """
    o, total = optimizer, optimizer.total_steps or LARGEST_INT
    if o.schedule == "wsd":
        begins, fall = decay_begins(optimizer), o.learning_rate - o.min_learning_rate

        def after_warmup(count: Array) -> Array:
            part = (count + o.warmup_steps - begins) / (total - begins)
            return o.learning_rate - fall * jnp.sqrt(jnp.clip(part, 0.0, 1.0))

    else:
        alpha = o.min_learning_rate / o.learning_rate
        after_warmup = optax.cosine_decay_schedule(o.learning_rate, total - o.warmup_steps, alpha)
    if o.warmup_steps == 0:
        return after_warmup
    warmup = optax.linear_schedule(o.learning_rate / (o.warmup_steps + 1), o.learning_rate, o.warmup_steps)
    return optax.join_schedules([warmup, after_warmup], [o.warmup_steps])


def decay_begins(optimizer: ConfigDict) -> int:
    """Return after how many updates the decay of the wsd schedule begins.

    >>> from jgpt.config import default_config
    >>> decay_begins(default_config().optimizer)
    600
    """
    total = optimizer.total_steps or LARGEST_INT
    return total - max(1, round(optimizer.decay_fraction * total))


def make_optimizer(
    optimizer: ConfigDict, policy: Policy = FP32, first_moment: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer, behind a clip of the gradient's global norm. `update` takes `share`: see `step/muon.py`.

    AdamW (Loshchilov and Hutter, arXiv 1711.05101) updates all parameters, or with "muon" those that are no matrices of
    the blocks; Muon's matrix products are in the dtypes of `policy`. Both keep the mean of gradients in the dtype
    `first_moment`. Weight decay falls on matrices and embeddings only, as in GPT-2: norms and biases are kept free.
    """
    schedule = learning_rate_schedule(optimizer)
    rule = optax.adamw(
        schedule,
        b1=optimizer.beta1,
        b2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decayed,
        mu_dtype=first_moment,
    )
    if optimizer.kind == "muon":
        ratio = optimizer.muon_learning_rate / optimizer.learning_rate
        muon = optax.chain(
            scale_by_muon(optimizer.muon_momentum, policy, first_moment),
            optax.add_decayed_weights(optimizer.weight_decay),
            optax.scale_by_learning_rate(lambda updates_made: ratio * schedule(updates_made)),
        )
        rule = optax.partition({"muon": muon, "adamw": rule}, _rules)
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return optax.with_extra_args_support(optax.chain(clip, rule))


def _rules(params: Any) -> Any:
    """Name the rule of each parameter: Muon's are the matrices of the blocks."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_matrix(path_names(path)) else "adamw", params)


def decayed(params: Any) -> Any:
    """Mark the parameters that weight decay acts on: kernels, embeddings and LoRA's a and b, never a bias or a norm."""
    names = ("kernel", "embedding", "a", "b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)
