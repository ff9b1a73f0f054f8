"""Evaluation: parameters and held-out blocks in, mean loss per token out.

In the data path: beside the step, on the same devices; training calls it now and then, `jgpt.evaluate` once.
"""

import math
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import jax
import numpy as np

from jgpt.data.batches import Batch
from jgpt.parallel.strategy import Strategy
from jgpt.step.eval_step import EvalStep


def evaluate(
    strategy: Strategy,
    eval_step: EvalStep,
    params: Any,
    frozen: Any,
    blocks: Iterable[Batch],
    rows: int,
    context_length: int,
) -> tuple[float, int]:
    """Return the mean loss in nats per target token, and the number of targets.

    Of several processes each has all blocks, and brings its part of them to its devices.

    `blocks` are single sequences of at most context_length + 1 tokens, each predicting all but its first, or those that
    have the weight 1 and not 0; `rows` of them go to each device at a time. `eval_step` is the strategy's; `params` and
    `frozen` are where its step has them. Short blocks and missing rows are filled up with targets of weight zero.
    """
    total, n_targets = 0.0, 0
    for batch in _batched(blocks, strategy.shares * rows):
        whole = _fill(batch, strategy.shares * rows, context_length)
        assert whole.weights is not None
        n_targets += int(whole.weights.sum(dtype=np.float64))
        own = jax.tree.map(itemgetter(strategy.own_rows(len(whole.tokens))), whole)
        total += float(strategy.on_host(eval_step(params, frozen, strategy.place_sequences(own))))
    return total / n_targets, n_targets


def _fill(blocks: list[Batch], rows: int, context_length: int) -> Batch:
    """Make one batch of single sequences."""
    tokens = np.zeros((rows, context_length + 1), np.int32)
    weights = np.zeros((rows, context_length), np.float32)
    segments = None if blocks[0].segments is None else np.zeros((rows, context_length), np.int32)
    for row, block in enumerate(blocks):
        n = len(block.tokens)
        tokens[row, :n] = block.tokens
        weights[row, : n - 1] = 1 if block.weights is None else block.weights
        if segments is not None:
            segments[row, : n - 1] = block.segments
    return Batch(tokens, weights, segments)


def _batched(blocks: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    batch = []
    for block in blocks:
        batch.append(block)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def bits_per_byte(loss: float, n_tokens: int, n_bytes: int) -> float:
    """Turn nats per token into bits per byte of text, which does not depend on the tokenizer.

    >>> round(bits_per_byte(math.log(2), n_tokens=100, n_bytes=400), 3)
    0.25
    """
    return loss / math.log(2) * n_tokens / n_bytes
