"""Evaluation against the plain mean over all targets, however the blocks are shared out."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.data.batches import Batch
from jgpt.data.blocks import blocks
from jgpt.model.gpt import GPT, unembedding
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.evaluation import bits_per_byte, evaluate
from jgpt.parallel.replicate import Replicate
from jgpt.step.eval_step import make_eval_step

T, V = 8, 32
MODEL = GPT(ModelConfig(V, T, n_layers=1, n_heads=2, n_kv_heads=2, d_model=8, d_head=4, d_ff=16, position="learned"))


@cache
def params() -> Any:
    small = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: 8 * x, small)  # so that the tokens' losses differ


@cache
def plain_losses() -> Any:
    """Return the loss of each target of [n, T+1] blocks, by the formula."""

    @jax.jit
    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        logits = MODEL.apply({"params": params}, tokens[:, :-1]).hidden @ unembedding(params).T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]

    return losses


@cache
def running(devices: int) -> tuple[Replicate, Any, Any]:
    runner = Replicate(jax.local_devices()[:devices])
    return runner, runner.eval_step(make_eval_step(MODEL, Policy(), 5)), runner.place_state(params())


def stream(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, V, n).astype(np.uint16)


@pytest.mark.parametrize("devices, rows", [(1, 2), (2, 2)])
@pytest.mark.parametrize("n", [2, T + 1, T + 2, 4 * T + 1, 9 * T + 4])
def test_is_the_plain_mean_over_every_target(n: int, devices: int, rows: int):
    """Whole batches, missing rows, and a short block at the end, each target weighing the same."""
    cut = list(blocks([stream(n)], T))
    padded = np.zeros((12, T + 1), np.int32)
    for row, block in enumerate(cut):
        padded[row, : len(block.tokens)] = block.tokens
    losses = np.asarray(plain_losses()(params(), padded))
    expected = sum(float(losses[row, : len(block.tokens) - 1].sum()) for row, block in enumerate(cut))
    runner, step, placed = running(devices)
    loss, n_targets = evaluate(runner, step, placed, {}, cut, rows, T)
    assert n_targets == n - 1
    assert loss == pytest.approx(expected / (n - 1), rel=1e-5)


def test_counts_the_targets_of_weight_one_alone_and_keeps_segments_apart():
    """The second half of each sequence is another text, which begins anew, and of which three targets count."""
    tokens = stream(5 * (T + 1)).reshape(5, T + 1).astype(np.int32)
    weights, segments = np.zeros((5, T), np.float32), np.repeat(np.int32([[0] * 4 + [1] * 4]), 5, axis=0)
    weights[:, 4:7] = 1
    sequences = [Batch(*arrays) for arrays in zip(tokens, weights, segments, strict=True)]
    runner, step, placed = running(2)
    loss, n_targets = evaluate(runner, step, placed, {}, sequences, 2, T)
    assert n_targets == 15
    padded = np.zeros((12, T + 1), np.int32)
    padded[:5, :5] = tokens[:, 4:]
    assert loss == pytest.approx(float(np.mean(plain_losses()(params(), padded)[:5, :3])), rel=1e-5)


@pytest.mark.parametrize("cut_at", [[], [1], [T], [T + 1], [3, 3, 40], [5, 6, 7, 8, 9, 100]])
@pytest.mark.parametrize("n", [0, 1, 2, T, T + 1, T + 2, 10 * T, 10 * T + 1, 123])
def test_blocks_predict_every_token_but_the_first_once(n: int, cut_at: list[int]):
    """Wherever the pieces of the stream end."""
    tokens = np.arange(n)
    cut = [block.tokens for block in blocks(np.split(tokens, [min(at, n) for at in cut_at]), T)]
    assert all(len(block) == T + 1 for block in cut[:-1]) and all(2 <= len(block) <= T + 1 for block in cut)
    assert np.concatenate([block[1:] for block in cut] or [tokens[1:]]).tolist() == tokens[1:].tolist()
    assert all(a[-1] == b[0] for a, b in zip(cut, cut[1:], strict=False))
    if cut:
        assert cut[0][0] == 0


def test_blocks_of_a_long_piece():
    """Longer than what is read of a piece at a time."""
    tokens = np.arange((1 << 20) + 1000, dtype=np.uint32)
    cut = list(blocks([tokens], 100_000))
    assert np.array_equal(np.concatenate([block.tokens[1:] for block in cut]), tokens[1:])


def test_bits_per_byte_of_a_uniform_guess():
    """256 equally likely bytes, one a token: 8 bits each."""
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8)
