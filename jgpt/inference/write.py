"""Texts that a model writes after a prompt.

After training, in the data path: around `decode.py`; `jgpt.generate` is the caller.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from jgpt.data.tokenizer import Tokenizer
from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.inference.text_stream import TextStream
from jgpt.model.gpt import GPT

SEPARATOR = "-" * 80


def write_samples(
    model: GPT,
    variables: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    sampling: Sampling,
    num_samples: int,
    max_new_tokens: int,
    context_length: int,
    stop_ids: Iterable[int],
    seed: int,
    stream: bool,
    write: Callable[[str], None],
) -> str:
    """Pass `num_samples` texts to `write`, each with its prompt; return the speed in a line.

    With `stream` a single text is written while it is made. `context_length` is the most tokens in view at a time, 0
    for the model's own.
    """
    ids = tokenizer.encode(prompt).tolist()
    start = tokenizer.start_ids or ([] if ids else [tokenizer.eot_id])
    text, streams = TextStream(tokenizer, ids), stream and num_samples == 1
    if streams:
        write(tokenizer.decode(ids))
    began = time.perf_counter()
    samples = generate(
        model,
        variables,
        [start + ids] * num_samples,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(stop_ids),
        n_ids=tokenizer.vocab_size,
        seed=seed,
        context_length=context_length,
        on_tokens=(lambda _, new: write(text.add(new))) if streams else None,
    )
    seconds, n_tokens = time.perf_counter() - began, sum(map(len, samples))
    if streams:
        write(text.close() + "\n")
    else:
        write(f"\n{SEPARATOR}\n".join(tokenizer.decode(ids + new) for new in samples) + "\n")
    return f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} a second, compilation included)"
