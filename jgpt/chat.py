"""Talk with a model that knows how to: one that was trained to answer, with its own chat template.

    python -m jgpt.chat --model HuggingFaceTB/SmolLM2-135M-Instruct
    python -m jgpt.chat --model runs/mine --system "You answer in one sentence."
    python -m jgpt.chat --model runs/mine --prompt "What is the capital of France?" --temperature 0

In the chat, /help lists what can be said beside questions. With --prompt it is one question: the answer goes to stdout,
all else to stderr. Where the flags name none, temperature and the like are the model's own (generation_config.json),
else 0.7, with top_k 50 and top_p 0.95. A model without a template writes on from a text by `jgpt.generate`.

After training, in the data path: a model in, a conversation out.
"""

import sys
from dataclasses import asdict, replace

import jax
from absl import flags

from jgpt.cli.run import run
from jgpt.data.chat_template import read_template
from jgpt.errors import UserError
from jgpt.hardware.devices import describe
from jgpt.hardware.process import set_up_process
from jgpt.inference.chat import HELP, Chat, talk
from jgpt.inference.sampling import Sampling
from jgpt.kaggle.session.secrets import provide_hub_token
from jgpt.loading.load import load_model

PROMPT = "> "
DEFAULT = Sampling(temperature=0.7, top_k=50, top_p=0.95)
ADVISED = Sampling(temperature=1.0, top_k=50)  # what transformers fills in where a model's own advice says nothing


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process and other commands have --model."""
    flags.DEFINE_string("model", None, "a run directory, a Hugging Face model directory, or a name on its Hub")
    flags.DEFINE_alias("run_dir", "model")
    flags.DEFINE_integer("step", None, "the checkpoint of a run to take; without it the newest", lower_bound=0)
    flags.DEFINE_string("base", "", "where the base model of a LoRA run is now, if it has moved")
    flags.DEFINE_string("system", None, "what the model is told before all questions")
    flags.DEFINE_string("prompt", None, "one question, instead of a chat")
    flags.DEFINE_string("chat_template", None, "a file with a Jinja template, instead of the model's own")
    flags.DEFINE_float("temperature", None, "0: always the likeliest token; 1: the model's own distribution")
    flags.DEFINE_integer("top_k", None, "draw from the k likeliest tokens only; 0: from all")
    flags.DEFINE_float("top_p", None, "draw from the fewest likeliest tokens that add up to this; 1: from all")
    flags.DEFINE_float("min_p", None, "draw from tokens at least this share as likely as the likeliest; 0: from all")
    flags.DEFINE_float("repetition_penalty", None, "above 1, tokens that the text already holds get less likely")
    flags.DEFINE_integer("seed", 1337, "another seed, another answer", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("max_new_tokens", 1024, "tokens of an answer, at most", lower_bound=1)
    flags.DEFINE_integer(
        "context_length", 4096, "tokens of question, history and answer together; 0: the model's own", lower_bound=0
    )
    flags.DEFINE_enum(
        "compute", "auto", ["auto", "fp32", "fp16", "bf16"], "dtype of the matrix products; auto: what suits the device"
    )
    flags.DEFINE_enum(
        "devices", "auto", ["auto", "1", "2", "all"], "that share the model; auto: one if it fits there, else all"
    )


def main() -> None:
    """Load the model, answer."""
    args = flags.FLAGS
    if args.model is None:
        raise UserError(
            "no --model was given. Allowed: a run directory, a Hugging Face model directory, or a name on its Hub. For"
            " example: --model HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    given = {name: getattr(args, name) for name in asdict(DEFAULT) if getattr(args, name) is not None}
    Sampling(**given).validate()
    template = read_template(args.chat_template) if args.chat_template else None
    provide_hub_token(args.model)
    set_up_process()
    loaded = load_model(args.model, args.step, args.compute, args.devices, args.context_length, base=args.base)
    template = template or loaded.tokenizer.settings.get("chat_template")
    if not template:
        raise UserError(
            f"{args.model} has no chat template: nothing says how a conversation is put to it. Needed: a model that was"
            " trained to answer, or its template by --chat_template=FILE. A base model writes on from a text:"
            " python -m jgpt.generate."
        )
    chat = Chat(
        loaded.model,
        {"params": loaded.params},
        loaded.tokenizer,
        template=template,
        system=args.system,
        sampling=replace(ADVISED if loaded.sampling else DEFAULT, **loaded.sampling | given),
        max_new_tokens=args.max_new_tokens,
        context_length=args.context_length,
        stop_ids=loaded.stop_ids,
        seed=args.seed,
    )
    device, dtype = describe(jax.local_devices()[0]).name, loaded.model.dtype.__name__
    _say(f"{args.model} on {device} in {dtype}, context {chat.context_length:,} tokens")
    if args.prompt is not None:
        answer = chat.ask(args.prompt, _write)
        _write("\n")
        _say(f"[{answer.summary()}]")
        return
    if sys.stdin.isatty():
        _say(HELP)
    talk(chat, _read, _write, _say)


def _read() -> str:
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            import readline  # noqa: F401  (gives input() its editing and history; not on Windows)
        except ImportError:
            pass
        return input(PROMPT)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 ({error.reason}). Allowed: UTF-8. Convert it: iconv -t utf-8") from None
    if not line:
        raise EOFError
    return line


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
