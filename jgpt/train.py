"""Train a GPT on your text, or resume a run that was stopped, was killed, or should train longer.

    python -m jgpt.train --config configs/quickstart.py
    python -m jgpt.train --config configs/kaggle_t4.py --config.data.text_glob='/kaggle/input/**/*.txt'

Everything that a run writes is in its run directory, config.out_dir: metrics.jsonl, loss.png, report.html, samples.txt,
checkpoints/, tokenizer/, status.json. The same command again resumes from the newest intact checkpoint. Ctrl-C,
SIGTERM, SIGHUP (a closed terminal) and --config.deadline_hours finish the step, save, and exit with 0.
"""

import shlex
import sys

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.process_flags import define_processes, join_processes
from jgpt.cli.run import run


def define_flags() -> None:
    """Define the flags."""
    define_config()
    define_processes()


def main() -> None:
    """Train the config of the command line."""
    join_processes()
    from jgpt.api import train  # here: --help must not wait for JAX

    arguments = [a for a in sys.argv[1:] if not a.startswith("--config.checkpoint.resume")]
    train(load_config(), command=shlex.join(["python", "-m", "jgpt.train", *arguments]))


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
