"""Train, resume, fine-tune and run GPT language models in JAX.

    jgpt COMMAND [--FLAG=VALUE ...]
    jgpt COMMAND --help

`jgpt COMMAND` and `python -m jgpt.COMMAND` are the same.

Beside the data path: the console script `jgpt`, and `python -m jgpt`.
"""

import runpy
import sys
from pathlib import Path

from jgpt.cli.text import columns, first_line
from jgpt.errors import EXIT_USER
from jgpt.wording import did_you_mean

FOLDER = Path(__file__).parent
COMMANDS = {
    "train": FOLDER / "train.py",
    "prepare": FOLDER / "prepare.py",
    "generate": FOLDER / "generate.py",
    "chat": FOLDER / "chat.py",
    "serve": FOLDER / "serve" / "__main__.py",
    "evaluate": FOLDER / "evaluate.py",
    "compare": FOLDER / "compare.py",
    "plan": FOLDER / "plan.py",
    "convert": FOLDER / "convert.py",
    "check_env": FOLDER / "check_env.py",
    "kaggle": FOLDER / "kaggle" / "__main__.py",
}
# What others call a command, or may be looked for as one.
CALLED = {
    **dict.fromkeys(("sample", "inference", "infer", "predict", "complete", "completion", "write"), "generate"),
    **dict.fromkeys(("finetune", "fine_tune", "sft", "lora"), "train --config finetune_lora"),
    **dict.fromkeys(("fit", "pretrain"), "train"),
    **dict.fromkeys(("resume", "continue"), "train, with the same arguments: it goes on by itself"),
    **dict.fromkeys(("export", "import", "adapter", "gguf"), "convert {name}"),
    **dict.fromkeys(("push", "pull", "publish", "chain"), "kaggle {name}"),
    **dict.fromkeys(("tokenize", "preprocess", "data"), "prepare"),
    **dict.fromkeys(("ui", "web", "server", "api"), "serve"),
    **dict.fromkeys(("doctor", "info", "env", "check"), "check_env"),
    "eval": "evaluate",
    "report": "train: report.html in the run directory is its report",
}


def entry() -> None:
    """Run the command that the first argument names, as `python -m jgpt.COMMAND` does; without one, list them all."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    command = name.replace("-", "_")  # check-env
    if command in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"jgpt.{command}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help", "-help", "help"):
        print(overview())
    else:
        meant = CALLED.get(command, "").format(name=command)
        hint = f" Did you mean jgpt {meant}?" if meant else did_you_mean(command, COMMANDS)
        print(f"error: {name!r} is no command.{hint} Allowed: {', '.join(COMMANDS)}.", file=sys.stderr)
        print("What they do: jgpt --help", file=sys.stderr)
        sys.exit(EXIT_USER)


def overview() -> str:
    """List the commands with a line each, from their docstrings."""
    usage = (__doc__ or "").split("\n\nBeside")[0]
    return f"{usage}\n\nCommands:\n" + columns((name, first_line(path)) for name, path in COMMANDS.items())


if __name__ == "__main__":
    entry()
