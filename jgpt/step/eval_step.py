"""The evaluation step: parameters and a batch in, the sum of its weighted losses out. Pure; it knows no device.

In the data path: beside `train_step.py`.
"""

from collections.abc import Callable
from typing import Any

from jax import Array

from jgpt.data.batches import Batch
from jgpt.model.gpt import GPT
from jgpt.model.loss import cross_entropy
from jgpt.model.precision import Policy
from jgpt.step.gradients import Gather, all_here
from jgpt.step.train_step import hidden_states

EvalStep = Callable[..., Array]  # see make_eval_step


def make_eval_step(model: GPT, policy: Policy, loss_chunk_tokens: int) -> EvalStep:
    """Return (params, frozen, batch [B, ...]) -> the loss of its targets, weighted and summed, fp32.

    Where a device has a part of the parameters, `gather` makes all of them out of it.
    """

    def eval_step(params: Any, frozen: Any, batch: Batch, gather: Gather = all_here) -> Array:
        params, frozen = gather(params, policy.cast_to_compute), policy.cast_to_compute(frozen)
        hidden, matrix = hidden_states(model, params, frozen, batch)
        assert batch.weights is not None
        return cross_entropy(hidden, matrix, batch.tokens[:, 1:], batch.weights, loss_chunk_tokens)

    return eval_step
