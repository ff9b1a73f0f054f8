"""Talk with a model that was trained to answer, through its own chat template.

    python -m jgpt.chat --model HuggingFaceTB/SmolLM2-135M-Instruct
    python -m jgpt.chat --model runs/mine --system "You answer in one sentence."
    python -m jgpt.chat --model runs/mine --prompt "What is the capital of France?" --temperature 0

In the chat, /help lists the commands. With --prompt it answers one question. The answer goes to stdout, all else to
stderr. Without flags, temperature and the like are the model's own (generation_config.json); where it has none,
temperature is 0.7, top_k 50 and top_p 0.95. A model without a chat template continues a text instead: `jgpt.generate`.

After training, in the data path: a model in, a conversation out.
"""

import sys

from absl import flags

from jgpt.cli import model_flags
from jgpt.cli.run import run
from jgpt.config.defaults import MOST_TOKENS


def define_flags() -> None:
    """Define the flags."""
    model_flags.define_model()
    flags.DEFINE_string("system", None, "the first message, which all answers follow")
    flags.DEFINE_string("prompt", None, "one question, instead of a chat")
    flags.DEFINE_string("chat_template", None, "a file with a Jinja template, instead of the model's own")
    model_flags.define_sampling()
    flags.DEFINE_integer("max_new_tokens", 1024, "tokens of an answer, at most", 1, MOST_TOKENS)
    flags.DEFINE_integer(
        "context_length", 4096, "tokens of question, history and answer together; 0: the model's own", lower_bound=0
    )
    model_flags.define_device()


def main() -> None:
    """Load the model, answer."""
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.api import load
    from jgpt.cli.terminal import read_message, say, write
    from jgpt.hardware.devices import chip_of, local_devices
    from jgpt.inference.chat import HELP, Chat, talk
    from jgpt.inference.chat_prompt import chat_sampling
    from jgpt.waiting import waiting

    args, name = flags.FLAGS, model_flags.model_name()
    given = model_flags.sampling_given()
    model = load(
        name,
        **model_flags.loading(),
        context_length=args.context_length,
        chat_template=args.chat_template or "",
    )
    loaded = model.loaded
    chat = Chat(
        loaded.model,
        {"params": loaded.params},
        model.chat_prompts([{"role": "system", "content": args.system}] if args.system else []),
        sampling=chat_sampling(loaded.sampling, given),
        max_new_tokens=args.max_new_tokens,
        context_length=args.context_length,
        seed=args.seed,
    )
    device, dtype = chip_of(local_devices()[0]).name, loaded.model.dtype.__name__
    say(f"{name} on {device} in {dtype}, context {chat.context_length:,} tokens")
    with waiting("compiling", sys.stderr):
        chat.warm_up()
    if args.prompt is not None:
        answer = chat.ask(args.prompt, write)
        write("\n")
        say(f"[{answer.summary()}]")
        return
    if sys.stdin.isatty():
        say(HELP)
    talk(chat, read_message, write, say)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
