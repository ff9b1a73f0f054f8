"""Generate text: continue prompts of token ids, with a cache of keys and values.

In the data path: the last step, between a trained model and text. A round is two compiled calls (`rounds.py`): the
prompts go through the model at once, then a loop draws token after token.

When the context is full, nanoGPT drops one token at each step. That moves all other tokens to other positions, so no
cached key or value stays valid, and each token costs a full forward pass. Here a full row drops the older half of its
window, and the next round begins with the newer half: one prefill for each context_length / 2 tokens, and always at
least half a context in view.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jgpt.errors import UserError
from jgpt.inference.arguments import whole
from jgpt.inference.rounds import (
    STREAM_STEPS,
    UNLIMITED,
    NonFiniteLogits,
    Task,
    bucket,
    compute_variables,
    decode,
    not_finite,
    prefill,
    seen_ids,
    stop_row,
    without_stop,
)
from jgpt.inference.sampling import Sampling
from jgpt.model.gpt import GPT


def generate(
    model: GPT,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    n_ids: int,
    seed: int,
    context_length: int = 0,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; return the new ids, without the stop token.

    `variables` holds "params", and "lora" where the model has adapters. Fp32 master parameters are allowed: matrices
    are cast to `model.dtype` once. A text ends at any of `stop_ids`. Ids from `n_ids` on are never drawn. The random
    numbers of row b depend only on the seed, b and the place in the text, not on the other rows. The model sees at most
    `context_length` tokens at a time (0: its own context length).

    Raises:
        UserError: an id of a prompt, `sampling` or `max_new_tokens` is out of range.
        NonFiniteLogits: the model's logits are inf or NaN.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for b, ids in stream(
        model,
        variables,
        prompts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        n_ids=n_ids,
        seed=seed,
        context_length=context_length,
        steps=UNLIMITED,
    ):
        found[b] += ids
    return found


def stream(
    model: GPT,
    variables: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    n_ids: int,
    seed: int,
    context_length: int = 0,
    steps: int = STREAM_STEPS,
) -> Iterator[tuple[int, list[int]]]:
    """Continue prompts as `generate` does; return an iterator over (b, the next ids of row b) while they are made.

    The first ids of a row are one token, the others up to `steps`. Raises as `generate` does, UserError at once.
    """
    sampling.validate()
    texts = _checked(prompts, n_ids, max_new_tokens)
    context = min(context_length or model.config.context_length, model.config.context_length)
    return _stream(model, variables, texts, sampling, max_new_tokens, stop_row(stop_ids), n_ids, seed, context, steps)


def _stream(
    model: GPT,
    variables: Mapping[str, Any],
    texts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stops: np.ndarray,
    n_ids: int,
    seed: int,
    context: int,
    steps: int,
) -> Iterator[tuple[int, list[int]]]:
    if not texts:
        return
    variables = compute_variables(model, variables)
    n, wanted, keep = len(texts), [len(text) + max_new_tokens for text in texts], context
    done = [max_new_tokens == 0] * n
    # A shorter cache makes each token cheaper. Where it is shorter than the context, it still holds every row whole.
    size = bucket(min(max(wanted), context), context)
    while not all(done):
        padded, lengths = _windows(texts, done, keep, size)
        start = np.array([len(text) for text in texts], np.int32) - lengths
        task = Task(
            seed=np.full(n, seed, np.uint32),
            row=np.arange(n, dtype=np.int32),
            start=start,
            stop=np.where(done, lengths, np.array(wanted, np.int32) - start),
            stop_ids=np.tile(stops, (n, 1)),
            n_ids=np.full(n, n_ids, np.int32),
            rules=sampling.rules(n),
        )
        seen = seen_ids(texts, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
        rows = prefill(model, size, variables, task, padded, lengths, seen)
        if steps == UNLIMITED:
            rows = decode(model, variables, task, rows, steps)
        while True:
            tokens, ends, now_done, finite = jax.device_get(rows[:4])
            if not finite.all():
                raise NonFiniteLogits(not_finite(model))
            for b, text in enumerate(texts):
                new = tokens[b, lengths[b] : ends[b]].tolist()
                text += new
                if new_ids := without_stop(new, stops):
                    yield b, new_ids
            lengths, done = ends, now_done.tolist()
            if np.all(now_done | (ends > size)):
                break
            rows = decode(model, variables, task, rows, steps)
        keep = max(1, context // 2)


def _checked(prompts: Sequence[Sequence[int]], n_ids: int, max_new_tokens: int) -> list[list[int]]:
    """Return the prompts as lists of Python's integers; raise UserError where something is out of range."""
    whole("max_new_tokens", max_new_tokens, 0)
    texts = [[int(i) for i in prompt] for prompt in prompts]
    if not all(texts):
        raise UserError("a prompt is empty. Allowed: one id and more. Begin a text with the id that begins documents.")
    if bad := [i for text in texts for i in text if not 0 <= i < n_ids]:
        raise UserError(
            f"a prompt holds the id {bad[0]}. Allowed: 0 to {n_ids - 1}. Encode it with the model's own tokenizer."
        )
    return texts


def _windows(texts: list[list[int]], done: list[bool], keep: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the last `keep` ids of each text (one of a text that is done), and how many they are, int32 [B].

    The ids are int32 [B, the bucket of the longest], zeros behind each row.
    """
    windows = [text[-1:] if finished else text[-keep:] for text, finished in zip(texts, done, strict=True)]
    lengths = np.array([len(window) for window in windows], np.int32)
    padded = np.zeros((len(windows), bucket(int(lengths.max()), size)), np.int32)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = window
    return padded, lengths
