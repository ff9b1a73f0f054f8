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
from pathlib import Path

import jax
from absl import flags

from jgpt.cli.run import run
from jgpt.errors import UserError
from jgpt.hardware.devices import describe
from jgpt.hardware.process import set_up_process
from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.inference.text_stream import TextStream
from jgpt.kaggle.session.secrets import provide_hub_token
from jgpt.loading.load import load_model

SEPARATOR = "-" * 80


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process and other commands have --model."""
    flags.DEFINE_string("model", None, "a run directory, a Hugging Face model directory, or a name on its Hub")
    flags.DEFINE_alias("run_dir", "model")
    flags.DEFINE_integer("step", None, "the checkpoint of a run to take; without it the newest", lower_bound=0)
    flags.DEFINE_string("base", "", "where the base model of a LoRA run is now, if it has moved")
    flags.DEFINE_string("prompt", None, "the text to continue; - reads it from stdin")
    flags.DEFINE_string("prompt_file", None, "a UTF-8 file with the text to continue")
    flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token; 1: the model's own distribution")
    flags.DEFINE_integer("top_k", 50, "draw from the k likeliest tokens only; 0: from all")
    flags.DEFINE_float(
        "top_p", 1.0, "draw from the fewest likeliest tokens that add up to this probability; 1: from all"
    )
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this share as likely as the likeliest; 0: from all")
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1, tokens that the text already holds get less likely")
    flags.DEFINE_integer("seed", 1337, "another seed, another text", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("num_samples", 1, "texts to write, all at the same time", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 200, "tokens after the prompt, at most", lower_bound=0)
    flags.DEFINE_integer("context_length", 0, "tokens in view at a time, at most; 0: the model's own", lower_bound=0)
    flags.DEFINE_enum(
        "compute", "auto", ["auto", "fp32", "fp16", "bf16"], "dtype of the matrix products; auto: what suits the device"
    )
    flags.DEFINE_enum(
        "devices", "auto", ["auto", "1", "2", "all"], "that share the model; auto: one if it fits there, else all"
    )
    flags.DEFINE_bool("stream", None, "write a single text while it is made, also where stdout is no terminal")


def main() -> None:
    """Load the model, write the samples."""
    args = flags.FLAGS
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    sampling.validate()
    if args.model is None:
        raise UserError(
            "no --model was given. Allowed: a directory that training wrote, a Hugging Face model directory, or a name"
            " on its Hub. For example: --model runs/quickstart"
        )
    prompt = read_prompt(args.prompt, args.prompt_file)
    provide_hub_token(args.model)
    set_up_process()
    longest = len(prompt.encode("utf-8", "replace")) + 2 + args.max_new_tokens  # no token is shorter than a byte
    in_view = min(args.context_length or longest, longest)
    loaded = load_model(args.model, args.step, args.compute, args.devices, in_view, args.num_samples, args.base)
    model, tokenizer = loaded.model, loaded.tokenizer
    step = "" if loaded.step is None else f", step {loaded.step:,}"
    val_loss = "" if loaded.val_loss is None else f", validation loss {loaded.val_loss:.4f}"
    _say(f"{args.model}{step}{val_loss}, on {describe(jax.local_devices()[0]).name} in {model.dtype.__name__}")

    ids = tokenizer.encode(prompt).tolist()
    start = tokenizer.start_ids or ([] if ids else [tokenizer.eot_id])
    stream = TextStream(tokenizer, ids)
    streams = args.num_samples == 1 and (sys.stdout.isatty() if args.stream is None else args.stream)
    if streams:
        print(tokenizer.decode(ids), end="", flush=True)
    began = time.perf_counter()
    samples = generate(
        model,
        {"params": loaded.params},
        [start + ids] * args.num_samples,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens,
        stop_ids=loaded.stop_ids,
        n_ids=tokenizer.vocab_size,
        seed=args.seed,
        context_length=args.context_length,
        on_tokens=(lambda _, new: print(stream.add(new), end="", flush=True)) if streams else None,
    )
    seconds, n_tokens = time.perf_counter() - began, sum(map(len, samples))
    if streams:
        print(stream.close())
    for i, new in enumerate([] if streams else samples):
        if i > 0:
            print(SEPARATOR)
        print(tokenizer.decode(ids + new))
    _say(f"{n_tokens:,} tokens in {seconds:.1f} s ({n_tokens / seconds:,.0f} a second, compilation included)")


def read_prompt(given: str | None, file: str | None) -> str:
    """Return the prompt from where the user put it; the newline that ends a file or a pipe is not part of it."""
    if given is not None and file is not None:
        raise UserError("both --prompt and --prompt_file were given. Allowed: one of them. Leave one out.")
    if file is not None:
        try:
            return _text(Path(file).read_bytes(), file)
        except OSError as error:
            raise UserError(
                f"--prompt_file={file}: {error.strerror}. Allowed: a file that can be read. Mend the path."
            ) from None
    if given == "-" or (given is None and not sys.stdin.isatty()):
        _say("reading the prompt from stdin")
        return _text(sys.stdin.buffer.read(), "stdin")
    return given or ""


def _text(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt in {source} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. Allowed: "
            "UTF-8. Convert it: iconv -f latin1 -t utf-8"
        ) from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
