"""Measure a trained model on text: loss in nats per token, perplexity, bits per byte of text.

    python -m jgpt.evaluate --model runs/quickstart
    python -m jgpt.evaluate --model runs/quickstart --text_glob 'other/**/*.txt'
    python -m jgpt.evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --text_glob 'other/**/*.txt'

Without --text_glob the text is all of the run's own validation split. Every token but the first is predicted once, in
blocks of the length that the run was trained on; of conversations those that are learned.
"""

import math
from collections.abc import Iterator
from itertools import chain

from absl import flags

from jgpt.cli.run import run
from jgpt.data.batches import Batch, validation_blocks
from jgpt.data.blocks import TokenStream, blocks
from jgpt.data.corpus import Corpus
from jgpt.data.find_files import find_files
from jgpt.data.token_files import TokenData, open_token_data, token_directory
from jgpt.errors import UserError
from jgpt.hardware.process import set_up_process
from jgpt.kaggle.session.secrets import provide_hub_token
from jgpt.loading.evaluate import evaluate_loaded
from jgpt.loading.load import LoadedModel, load_model
from jgpt.parallel.evaluation import bits_per_byte

LONGEST = 2048  # tokens of a block, where neither the user nor a run says how many


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process and other commands have --run_dir."""
    flags.DEFINE_string("model", None, "a run directory, a Hugging Face model directory, or a name on its Hub")
    flags.DEFINE_alias("run_dir", "model")
    flags.DEFINE_string("base", "", "where the base model of a LoRA run is, if not where it was trained from")
    flags.DEFINE_integer("sequence_length", 0, "tokens of a block; 0: as trained, or up to 2048", lower_bound=0)
    flags.DEFINE_integer("step", None, "the checkpoint to measure; without it the newest whole one", lower_bound=0)
    flags.DEFINE_string("text_glob", "", "text to measure on: a glob, a directory, or several with commas between")
    flags.DEFINE_string("text_field", "text", "the field that holds the text in .jsonl and .parquet")
    flags.DEFINE_enum(
        "encoding_errors", "strict", ["strict", "replace"], "bytes that are not UTF-8: refuse, or put U+FFFD"
    )


def main() -> None:
    """Load, measure, print."""
    args = flags.FLAGS
    if not args.model:
        raise UserError(
            "no --model was given. Allowed: a directory that training wrote, or a Hugging Face model. For example:"
            " --model runs/quickstart"
        )
    provide_hub_token(args.model)
    set_up_process()
    loaded = load_model(args.model, args.step, context_length=args.sequence_length or LONGEST, base=args.base)
    most = loaded.model.config.context_length
    length = args.sequence_length or loaded.config.batch.sequence_length or min(most, LONGEST)
    if length > most:
        raise UserError(
            f"--sequence_length={length}, and the model sees {most} tokens. Allowed: up to that. Give less."
        )
    rows = max(1, min(8, 8192 // length))
    if args.text_glob:
        corpus = Corpus(find_files(args.text_glob), args.text_field, args.encoding_errors)
        stream = TokenStream(corpus, loaded.tokenizer)
        loss, n_tokens = evaluate_loaded(loaded, _some(blocks(stream, length)), rows, length)
        n_targets, n_bytes, text = n_tokens + 1, stream.n_bytes, args.text_glob
    else:
        data = _own_tokens(loaded, args.model)
        sequences = blocks([data.val], length)
        if data.is_chat:
            sequences = iter(validation_blocks(data, length, len(data.val), length_key="sequence_length"))
        loss, n_tokens = evaluate_loaded(loaded, _some(sequences), rows, length)
        n_targets, n_bytes, text = data.val_targets, data.meta["val_bytes"], "the run's validation split"
    print(f"text              {text}")
    print(f"tokens            {n_tokens:,} predicted, of {n_bytes:,} bytes of text")
    at_step = "" if loaded.step is None else f" (step {loaded.step})"
    print(f"loss              {loss:.4f} nats per token{at_step}")
    print(f"perplexity        {math.exp(loss):.2f}")
    print(f"bits per byte     {bits_per_byte(loss, n_targets, n_bytes):.4f}")


def _own_tokens(loaded: LoadedModel, run_dir: str) -> TokenData:
    """Open the token directory that a run was trained on."""
    if loaded.step is None:
        raise UserError(f"{run_dir} is no run: it has no validation split. Name the text by --text_glob=GLOB.")
    loaded.config.out_dir = run_dir  # where the run is now: it may have been moved
    directory = token_directory(loaded.config)
    data = open_token_data(directory)
    if data.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{directory} holds tokens of another tokenizer ({data.tokenizer.vocab_size:,} ids) than the run's "
            f"({loaded.tokenizer.vocab_size:,} ids). They must be the same. Name the text itself by --text_glob=GLOB."
        )
    return data


def _some(found: Iterator[Batch]) -> Iterator[Batch]:
    """Return the same blocks; raise UserError when there are none."""
    first = next(found, None)
    if first is None:
        raise UserError("the text has no two tokens. A loss needs one token to predict another. Give more text.")
    return chain([first], found)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
