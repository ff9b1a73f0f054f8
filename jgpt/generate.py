"""Write text with a trained model.

    python -m jgpt.generate --run_dir runs/quickstart --prompt "def main("
    python -m jgpt.generate --run_dir runs/quickstart --num_samples 5 --temperature 1 --seed 7
    git diff | python -m jgpt.generate --run_dir runs/quickstart --max_new_tokens 50

The prompt is --prompt, or the file --prompt_file, or what comes through a pipe (`--prompt -` waits for it); with
none, or an empty one, the model begins a new document. The text goes to stdout, prompt included, all else to stderr.
The same seed gives the same text.

After training, in the data path: a run directory in, text out.
"""

import sys
import time
from pathlib import Path

import jax
from absl import flags

from jgpt.cli import run
from jgpt.config import UserError
from jgpt.hardware.devices import compute_capability, describe, set_up_process
from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.model.precision import choose_policy
from jgpt.training.loading import load_model

SEPARATOR = "-" * 80


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process and other commands have --run_dir."""
    flags.DEFINE_string("run_dir", None, "the run directory that training wrote")
    flags.DEFINE_integer("step", None, "the checkpoint to take; without it the newest", lower_bound=0)
    flags.DEFINE_string("prompt", None, "the text to continue; - reads it from stdin")
    flags.DEFINE_string("prompt_file", None, "a UTF-8 file with the text to continue")
    flags.DEFINE_float("temperature", 0.8, "0: always the likeliest token; 1: the model's own distribution")
    flags.DEFINE_integer("top_k", 50, "draw from the k likeliest tokens only; 0: from all")
    flags.DEFINE_float(
        "top_p", 1.0, "draw from the fewest likeliest tokens that add up to this probability; 1: from all"
    )
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this share as likely as the likeliest; 0: from all")
    flags.DEFINE_integer("seed", 1337, "another seed, another text", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("num_samples", 1, "texts to write, all at the same time", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 200, "tokens after the prompt, at most", lower_bound=0)
    flags.DEFINE_enum(
        "compute",
        None,
        ["auto", "fp32", "fp16", "bf16"],
        "dtype of the matrix products; without it what suits the device",
    )


def main() -> None:
    """Load the run, write the samples."""
    args = flags.FLAGS
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    sampling.validate()
    if args.run_dir is None:
        raise UserError(
            "no --run_dir was given. Allowed: a directory that training wrote. For example: --run_dir runs/quickstart"
        )
    prompt = read_prompt(args.prompt, args.prompt_file)
    set_up_process()
    loaded = load_model(args.run_dir, args.step)
    device = jax.devices()[0]
    model, tokenizer = loaded.model, loaded.tokenizer
    if args.compute:
        policy = choose_policy(args.compute, "fp32", device.platform, compute_capability(device))
        model = model.clone(dtype=policy.compute)
    val_loss = "" if loaded.val_loss is None else f", validation loss {loaded.val_loss:.4f}"
    _say(f"{args.run_dir}, step {loaded.step:,}{val_loss}, on {describe(device).name} in {model.dtype.__name__}")

    ids = tokenizer.encode(prompt).tolist()
    began = time.perf_counter()
    samples = generate(
        model,
        loaded.params,
        [ids] * args.num_samples,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens,
        eot_id=tokenizer.eot_id,
        n_ids=tokenizer.vocab_size,
        seed=args.seed,
    )
    seconds, n_tokens = time.perf_counter() - began, sum(map(len, samples))
    for i, new in enumerate(samples):
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
