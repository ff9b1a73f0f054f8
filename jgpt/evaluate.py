"""Measure a trained model on text: loss in nats per token, perplexity, bits per byte of text.

    python -m jgpt.evaluate --model runs/quickstart
    python -m jgpt.evaluate --model runs/quickstart --text_glob 'other/**/*.txt'
    python -m jgpt.evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --format chat --text_glob 'chats/*.jsonl'

Without --text_glob the text is the run's whole validation split. Each token except the first is predicted once,
in blocks as long as in training. Of conversations (--format chat, and every run that was trained on some) only what
training learns is counted: the answers. The files are .jsonl, with lines in any layout that training reads
(docs/finetuning.md).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from absl import flags

from jgpt.cli import model_flags
from jgpt.cli.process_flags import define_processes, join_processes
from jgpt.cli.run import run
from jgpt.config.check import is_encoding
from jgpt.config.defaults import KEYS
from jgpt.errors import UserError

if TYPE_CHECKING:
    from jgpt.loading.measure import Measured
    from jgpt.loading.model import Model


def define_flags() -> None:
    """Define the flags."""
    model_flags.define_model()
    flags.DEFINE_integer("sequence_length", 0, "tokens of a block; 0: as trained, or up to 2048", lower_bound=0)
    flags.DEFINE_string("text_glob", "", "text to measure on: a glob, a directory, or several with commas between")
    flags.DEFINE_enum(
        "format", "auto", ["auto", "text", "chat"], "what the files hold; auto: what the run was trained on, else text"
    )
    flags.DEFINE_string("text_field", "text", "the field that holds the text in .jsonl and .parquet, for --format text")
    flags.DEFINE_string("chat_template", None, "a file with a Jinja template, instead of the model's own")
    data = KEYS["data.encoding"], KEYS["data.encoding_errors"]
    flags.DEFINE_string("encoding", "utf-8", data[0].reason)
    flags.register_validator("encoding", is_encoding, "Python knows no such text encoding; for example: gb18030")
    flags.DEFINE_enum("encoding_errors", "strict", list(data[1].choices), data[1].explained())
    model_flags.define_device()
    define_processes()


def main() -> None:
    """Load, measure, print."""
    join_processes()
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.api import load
    from jgpt.cli.terminal import say, write
    from jgpt.data.unknown import name_unknown
    from jgpt.loading.measure import LONGEST
    from jgpt.parallel.hosts import is_first
    from jgpt.parallel.watch import together

    args, name = flags.FLAGS, model_flags.model_name()
    with together():
        model = load(
            name,
            **model_flags.loading(),
            context_length=args.sequence_length or LONGEST,
            chat_template=args.chat_template or "",
        )
        found, loaded = _measure(model), model.loaded
    if not is_first():
        return
    at_step = "" if loaded.step is None else f" (step {loaded.step})"
    split = "the run's validation split"
    write(f"text              {args.text_glob or split}\n")
    what = "answers" if found.is_chat else "text"
    print(f"tokens            {found.n_tokens:,} predicted, of {found.n_bytes:,} bytes of {what}")
    print(f"loss              {found.loss:.4f} nats per token{at_step}")
    print(f"perplexity        {found.perplexity:.2f}")
    print(f"bits per byte     {found.bits_per_byte:.4f}")
    if note := name_unknown(found.unknown, "the text"):
        say(f"note: {note}")
    guessing = math.log(loaded.tokenizer.vocab_size)
    if found.loss > guessing:
        say(
            f"note: the loss is above {guessing:.2f}, which guessing among all tokens would give. The model has seen no"
            " text like this, such as another language or script, or it is not trained yet."
        )


def _measure(model: Model) -> Measured:
    """Measure on the files that the flags name, else on the validation split of the model's run."""
    from jgpt.loading.measure import block_length, measure_chat_files, measure_files  # here: --help does without JAX

    args, loaded = flags.FLAGS, model.loaded
    how = (args.encoding, args.encoding_errors, block_length(loaded, args.sequence_length))
    own = loaded.config.data.format  # of a model of others: text
    kind = own if args.format == "auto" else args.format
    if args.text_glob and kind == "chat":
        return measure_chat_files(loaded, args.text_glob, model.require_template(), *how)
    if args.text_glob:
        return measure_files(loaded, args.text_glob, args.text_field, *how)
    if kind != own and loaded.step is not None:
        raise UserError(
            f"--format={kind}, and the validation split of {model.name} is of format {own}. Leave --format out, or"
            " name other files by --text_glob=GLOB."
        )
    return model.evaluate(sequence_length=args.sequence_length)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
