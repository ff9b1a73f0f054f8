"""Train a GPT on your text, or go on with a run that was stopped, killed or is to train longer.

    python -m jgpt.train --config configs/quickstart.py
    python -m jgpt.train --config configs/kaggle_t4.py --config.data.text_glob='/kaggle/input/**/*.txt'

Everything that a run writes is in its run directory, config.out_dir: metrics.jsonl, loss.png, report.html, samples.txt,
checkpoints/, tokenizer/, status.json. The same command again goes on from the newest whole checkpoint. Ctrl-C, SIGTERM
and --config.deadline_hours finish the step, save, and exit with 0.
"""

import shlex
import sys

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.run import run, set_up_logging
from jgpt.kaggle.session.open import open_session
from jgpt.training import start


def train(config, command: str = "") -> None:
    """Train as the command does; for notebooks. `config` is a config file's get_config()."""
    set_up_logging()
    with open_session(config) as (config, on_saved):
        start.train(config, command or "call train(config) again", on_saved)


def main() -> None:
    """Train the config of the command line."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--config.checkpoint.resume")]
    train(load_config(), shlex.join(["python", "-m", "jgpt.train", *arguments]))


if __name__ == "__main__":
    define_config()
    run(main, __doc__)
