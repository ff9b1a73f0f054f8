"""Train on Kaggle from this machine, through the kaggle package: `python -m jgpt.kaggle VERB`, or `jgpt-kaggle VERB`.

    pip install 'jgpt[kaggle]'
    python -m jgpt.kaggle push --config configs/kaggle_t4.py --slug me/my-gpt --dataset me/my-texts
    python -m jgpt.kaggle status --slug me/my-gpt
    python -m jgpt.kaggle pull --slug me/my-gpt

Beside the data path: it sends jgpt to Kaggle, where the data path runs, and downloads the run directory.
"""

import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

from jgpt.cli.run import run
from jgpt.cli.text import columns
from jgpt.errors import UserError
from jgpt.kaggle.laptop import verbs, verbs_look, verbs_run
from jgpt.wording import did_you_mean


class Verb(NamedTuple):
    """A function whose docstring is its help, and the function that defines its flags."""

    main: Callable[..., None]
    define_flags: Callable[[], None]


VERBS = {
    "push": Verb(verbs_run.push, verbs.define_kernel),
    "status": Verb(verbs_look.status, verbs_look.define_version),
    "logs": Verb(verbs_look.logs, verbs_look.define_logs),
    "pull": Verb(verbs_look.pull, verbs_look.define_pull),
    "resume": Verb(verbs_run.resume, verbs.define_kernel_again),
    "chain": Verb(verbs_run.chain, verbs_run.define_chain),
    "publish": Verb(verbs_look.publish, verbs_look.define_publish),
    "doctor": Verb(verbs_run.doctor, verbs_run.define_doctor),
}
EXIT_CODES = (
    ("0", "done"),
    ("1", "a bug of jgpt: the only one that shows a traceback"),
    ("2", "a mistake in what was given, or Kaggle refuses it, or a run there failed: the message says what to do"),
    ("130", "interrupted; the run on Kaggle continues"),
)


def entry() -> None:
    """Run the verb that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    codes = f"Exit codes:\n{columns(EXIT_CODES)}"
    if name in VERBS:
        verb = VERBS[name]
        del sys.argv[1]
        verb.define_flags()
        run(verb.main, f"{inspect.getdoc(verb.main)}\n\n{codes}")
    else:
        if name and not name.startswith("-"):
            del sys.argv[2:]  # the flags of a verb that there is not
        lines = columns((name, (inspect.getdoc(verb.main) or "").split("\n")[0]) for name, verb in VERBS.items())
        run(unknown, f"{__doc__}\nVerbs, each with a --help of its own:\n{lines}\n\n{codes}")


def unknown(name: str = "") -> None:
    """Raise UserError for a word that is not a verb."""
    given = f"{name!r} is not a verb.{did_you_mean(name, VERBS)}" if name else "no verb was given."
    raise UserError(f"{given} Allowed: {', '.join(VERBS)}. See: python -m jgpt.kaggle --help")


if __name__ == "__main__":
    entry()
