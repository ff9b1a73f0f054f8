"""Write text with a model: one that jgpt trained, or any that `jgpt.convert import` takes.

    python -m jgpt.generate --model runs/quickstart --prompt "def main("
    python -m jgpt.generate --model runs/quickstart --num_samples 5 --temperature 1 --seed 7
    git diff | python -m jgpt.generate --model HuggingFaceTB/SmolLM2-135M --max_new_tokens 50

The prompt is --prompt, or the file --prompt_file, or what comes through a pipe (`--prompt -` waits for it); with
none, or an empty one, the model begins a new document. The text goes to stdout, prompt included, all else to stderr.
The same seed gives the same text. On a terminal a single text appears while it is made.

After training, in the data path: a model in, text out.
"""

import sys
import time
from itertools import chain, islice

from absl import flags

from jgpt.cli import model_flags
from jgpt.cli.run import run
from jgpt.config.defaults import MOST_TOKENS

SEPARATOR = "-" * 80


def define_flags() -> None:
    """Define the flags."""
    model_flags.define_model()
    flags.DEFINE_string("prompt", None, "the text to continue; - reads it from stdin")
    flags.DEFINE_string("prompt_file", None, "a UTF-8 file with the text to continue")
    model_flags.define_sampling(temperature=0.8, top_k=50, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    flags.DEFINE_integer("num_samples", 1, "texts to write, all at the same time", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 200, "tokens after the prompt, at most", 0, MOST_TOKENS)
    flags.DEFINE_integer("context_length", 0, "tokens in view at a time, at most; 0: the model's own", lower_bound=0)
    model_flags.define_device()
    flags.DEFINE_bool("stream", None, "write a single text while it is made, also where stdout is no terminal")


def main() -> None:
    """Load the model, write the texts."""
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.api import load
    from jgpt.cli.terminal import read_prompt, say, write
    from jgpt.data.unknown import name_unknown, unknown_characters
    from jgpt.hardware.devices import chip_of, local_devices
    from jgpt.inference.rounds import STREAM_STEPS, UNLIMITED
    from jgpt.inference.sampling import Sampling
    from jgpt.inference.write import text_prompt
    from jgpt.waiting import waiting

    args, name = flags.FLAGS, model_flags.model_name()
    sampling = Sampling(**model_flags.sampling_given())
    text = read_prompt(args.prompt, args.prompt_file)
    longest = len(text.encode("utf-8", "replace")) + 2 + args.max_new_tokens  # no token is shorter than a byte
    context_length = min(args.context_length or longest, longest)
    model = load(name, **model_flags.loading(), context_length=context_length, rows=args.num_samples)
    loaded = model.loaded
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    val_loss = "" if loaded.val_loss is None else f", validation loss {loaded.val_loss:.4f}"
    say(f"{name}{step}{val_loss}, on {chip_of(local_devices()[0]).name} in {loaded.model.dtype.__name__}")
    if note := name_unknown(unknown_characters(model.tokenizer, text), "the prompt"):
        say(f"note: {note}")

    prompt = text_prompt(model.tokenizer, text)
    streams = args.num_samples == 1 and (sys.stdout.isatty() if args.stream is None else args.stream)
    began, n_tokens = time.perf_counter(), 0
    samples = [model.tokenizer.decode(prompt.text)] * args.num_samples
    pieces = model.pieces(
        [prompt] * args.num_samples,
        sampling,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        context_length=args.context_length,
        steps=STREAM_STEPS if streams else UNLIMITED,
    )
    with waiting("compiling" if streams else "compiling and writing", sys.stderr):
        first = list(islice(pieces, 1))
    if streams:
        write(samples[0])
    for number, piece, n_new in chain(first, pieces):
        samples[number] += piece
        n_tokens += n_new
        if streams:
            write(piece)
    seconds = time.perf_counter() - began
    write("\n" if streams else f"\n{SEPARATOR}\n".join(samples) + "\n")
    say(f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} a second, compilation included)")


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
