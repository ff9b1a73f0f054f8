"""Evaluation: parameters and held-out blocks in, mean loss per token out.

In the data path: beside the step, on the same devices; the loop calls it now and then, `jgpt.evaluate` once.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jgpt.training.step import EvalStep, Pmap


def evaluate(
    runner: Pmap, eval_step: EvalStep, params: Any, blocks: Iterable[np.ndarray], rows: int, context_length: int
) -> tuple[float, int]:
    """Return the mean loss in nats per target token, and the number of targets.

    `blocks` are int arrays of at most context_length + 1 tokens, each predicting all but its first; `rows` of them go to each
    device at a time. `eval_step` is the runner's; `params` are where its step has them. Short blocks and missing
    rows are filled up with targets of weight zero.
    """
    total, n_targets = 0.0, 0
    devices = len(runner.devices)
    for batch in _batched(blocks, devices * rows):
        tokens = np.zeros((devices * rows, context_length + 1), np.int32)
        weights = np.zeros((devices * rows, context_length), np.float32)
        for row, block in enumerate(batch):
            tokens[row, : len(block)] = block
            weights[row, : len(block) - 1] = 1
            n_targets += len(block) - 1
        shape = devices, rows, -1
        placed = runner.place_batch(tokens.reshape(shape)), runner.place_batch(weights.reshape(shape))
        total += float(runner.on_host(eval_step(params, *placed)))
    return total / n_targets, n_targets


def _batched(blocks: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
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
