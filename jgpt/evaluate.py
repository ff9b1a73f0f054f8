"""Measure a trained model on text: loss in nats per token, perplexity, bits per byte of text.

    python -m jgpt.evaluate --run_dir runs/quickstart
    python -m jgpt.evaluate --run_dir runs/quickstart --text_glob 'other/**/*.txt'

Without --text_glob the text is all of the run's own validation split. Every token but the
first is predicted once, in blocks of the model's context length.
"""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from absl import flags

from jgpt.cli import run
from jgpt.config import UserError
from jgpt.data.corpus import Corpus
from jgpt.data.files import find_files
from jgpt.data.memmap import open_token_data, token_directory
from jgpt.hardware.devices import set_up_process
from jgpt.training.evaluation import TokenStream, bits_per_byte, blocks, evaluate_run
from jgpt.training.setup import LoadedRun, load_run


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process and other commands have --run_dir."""
    flags.DEFINE_string("run_dir", None, "the run directory: a run's config.out_dir")
    flags.DEFINE_integer("step", None, "the checkpoint to measure; without it the newest whole one", lower_bound=0)
    flags.DEFINE_string("text_glob", "", "text to measure on: a glob, a directory, or several with commas between")
    flags.DEFINE_string("text_field", "text", "the field that holds the text in .jsonl and .parquet")
    flags.DEFINE_enum(
        "encoding_errors", "strict", ["strict", "replace"], "bytes that are not UTF-8: refuse, or put U+FFFD"
    )


def main() -> None:
    """Load, measure, print."""
    args = flags.FLAGS
    if not args.run_dir:
        raise UserError(
            "no --run_dir was given. Allowed: a directory that training wrote. For example: --run_dir runs/quickstart"
        )
    set_up_process()
    loaded = load_run(Path(args.run_dir), args.step)
    if args.text_glob:
        try:
            corpus = Corpus(find_files(args.text_glob), args.text_field, args.encoding_errors)
            stream = TokenStream(corpus, loaded.tokenizer)
            loss, n_tokens = evaluate_run(loaded, _some(blocks(stream, loaded.config.model.context_length)))
        except UserError as error:  # of the corpus, which knows these options by their names in a config
            raise UserError(str(error).replace("--config.data.", "--").replace("data.text_glob", "text_glob")) from None
        n_bytes, text = stream.n_bytes, args.text_glob
    else:
        val, n_bytes = _validation_split(loaded, args.run_dir)
        loss, n_tokens = evaluate_run(loaded, _some(blocks([val], loaded.config.model.context_length)))
        text = "the run's validation split"
    print(f"text              {text}")
    print(f"tokens            {n_tokens:,} predicted, of {n_bytes:,} bytes of text")
    print(f"loss              {loss:.4f} nats per token (step {loaded.step})")
    print(f"perplexity        {math.exp(loss):.2f}")
    print(f"bits per byte     {bits_per_byte(loss, n_tokens + 1, n_bytes):.4f}")


def _validation_split(loaded: LoadedRun, run_dir: str) -> tuple[np.ndarray, int]:
    """Return the run's own validation tokens and the bytes of their text."""
    loaded.config.out_dir = run_dir  # where the run is now: it may have been moved
    directory = token_directory(loaded.config)
    data = open_token_data(directory)
    if data.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{directory} holds tokens of another tokenizer ({data.tokenizer.vocab_size:,} ids) than the run's "
            f"({loaded.tokenizer.vocab_size:,} ids). They must be the same. Name the text itself by --text_glob=GLOB."
        )
    return data.val, data.meta["val_bytes"]


def _some(found: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Return the same blocks; raise UserError when there are none."""
    first = next(found, None)
    if first is None:
        raise UserError("the text has no two tokens. A loss needs one token to predict another. Give more text.")
    return chain([first], found)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
