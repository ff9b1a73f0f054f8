"""Evaluation: parameters and held-out blocks in, mean loss per token out.

In the data path: beside the step, on the same devices; the loop calls it now and then, `jgpt.evaluate` once.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jgpt.data.batches import Batch
from jgpt.data.corpus import Corpus
from jgpt.data.tokenizer import Tokenizer
from jgpt.training.loading import LoadedModel
from jgpt.training.step import EvalStep, Pmap, make_eval_step
from jgpt.training.tensor_parallel import TensorParallel


def evaluate(
    runner: Pmap | TensorParallel,
    eval_step: EvalStep,
    params: Any,
    frozen: Any,
    blocks: Iterable[Batch],
    rows: int,
    context_length: int,
) -> tuple[float, int]:
    """Return the mean loss in nats per target token, and the number of targets.

    `blocks` are single sequences of at most context_length + 1 tokens, each predicting all but its first, or those that
    have the weight 1 and not 0; `rows` of them go to each device at a time. `eval_step` is the runner's; `params` and
    `frozen` are where its step has them. Short blocks and missing rows are filled up with targets of weight zero.
    """
    total, n_targets = 0.0, 0
    for batch in _batched(blocks, runner.shares * rows):
        whole = _fill(batch, runner.shares * rows, context_length)
        assert whole.weights is not None
        n_targets += int(whole.weights.sum(dtype=np.float64))
        placed = runner.place_batch(jax.tree.map(lambda x: x.reshape(runner.shares, rows, -1), whole))
        total += float(runner.on_host(eval_step(params, frozen, placed)))
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


def evaluate_run(
    loaded: LoadedModel, blocks: Iterable[Batch], rows: int = 8, context_length: int = 0
) -> tuple[float, int]:
    """Evaluate a loaded model on `blocks`, on every device of this machine; returns as `evaluate` does.

    A model that one device holds is copied to all of them. `context_length` is the blocks' (0: the model's).
    """
    devices = sorted(jax.tree.leaves(loaded.params)[0].devices(), key=lambda device: device.id)
    shared = len(devices) > 1
    runner = TensorParallel(devices, loaded.model.config) if shared else Pmap(jax.local_devices())
    step = runner.eval_step(make_eval_step(loaded.model, loaded.policy, loaded.config.loss_chunk_tokens))
    params = loaded.params if shared else runner.place_state(loaded.params)
    return evaluate(runner, step, params, {}, blocks, rows, context_length or loaded.model.config.context_length)


class TokenStream:
    """The ids of a corpus, piece by piece, an end-of-text id behind each document; counts the bytes passed."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus, self.tokenizer, self.n_bytes = corpus, tokenizer, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in self.corpus.pieces():
            self.n_bytes += len(piece.text.encode("utf-8", "surrogatepass"))
            ids = self.tokenizer.encode(piece.text)
            yield np.append(ids, np.uint32(self.tokenizer.eot_id)) if piece.ends_document else ids


def blocks(pieces: Iterable[np.ndarray], context_length: int) -> Iterator[Batch]:
    """Cut a stream of ids into blocks of context_length + 1, neighbours sharing one id; the last may be shorter."""
    rest = np.zeros(0, np.int64)
    for piece in pieces:
        for start in range(0, len(piece), 1 << 20):  # a memmap is read a part at a time
            rest = np.concatenate([rest, piece[start : start + (1 << 20)]])
            while len(rest) > context_length:
                yield Batch(rest[: context_length + 1])
                rest = rest[context_length:]
    if len(rest) > 1:
        yield Batch(rest)
