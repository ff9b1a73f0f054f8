"""Measure a trained model on text: loss in nats per token, perplexity, bits per byte of text.

    python -m jgpt.evaluate --model runs/quickstart
    python -m jgpt.evaluate --model runs/quickstart --text_glob 'other/**/*.txt'
    python -m jgpt.evaluate --model HuggingFaceTB/SmolLM2-135M-Instruct --text_glob 'other/**/*.txt'

Without --text_glob the text is the run's whole validation split. Each token except the first is predicted once,
in blocks as long as in training. Of conversations only the tokens that training learns are counted.
"""

from absl import flags

from jgpt.cli import model_flags
from jgpt.cli.run import run
from jgpt.config.check import is_encoding
from jgpt.config.defaults import KEYS


def define_flags() -> None:
    """Define the flags."""
    model_flags.define_model()
    flags.DEFINE_integer("sequence_length", 0, "tokens of a block; 0: as trained, or up to 2048", lower_bound=0)
    flags.DEFINE_string("text_glob", "", "text to measure on: a glob, a directory, or several with commas between")
    flags.DEFINE_string("text_field", "text", "the field that holds the text in .jsonl and .parquet")
    data = KEYS["data.encoding"], KEYS["data.encoding_errors"]
    flags.DEFINE_string("encoding", "utf-8", data[0].reason)
    flags.register_validator("encoding", is_encoding, "Python knows no such text encoding; for example: gb18030")
    flags.DEFINE_enum("encoding_errors", "strict", list(data[1].choices), data[1].explained())
    model_flags.define_device()


def main() -> None:
    """Load, measure, print."""
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.kaggle.session.secrets import provide_hub_token
    from jgpt.loading.measure import LONGEST, block_length, measure_text, measure_validation_split

    args, name = flags.FLAGS, model_flags.model_name()
    provide_hub_token(name)
    loaded = model_flags.load(args.sequence_length or LONGEST)
    length = block_length(loaded, args.sequence_length)
    if args.text_glob:
        found = measure_text(loaded, args.text_glob, args.text_field, args.encoding, args.encoding_errors, length)
    else:
        found = measure_validation_split(loaded, name, length)
    at_step = "" if loaded.step is None else f" (step {loaded.step})"
    print("text             ", args.text_glob or "the run's validation split")
    print(f"tokens            {found.n_tokens:,} predicted, of {found.n_bytes:,} bytes of text")
    print(f"loss              {found.loss:.4f} nats per token{at_step}")
    print(f"perplexity        {found.perplexity:.2f}")
    print(f"bits per byte     {found.bits_per_byte:.4f}")


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
