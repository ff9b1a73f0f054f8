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
from jgpt.cli.run import run, set_up_logging


def train(config, command: str = "") -> None:
    """Train as the command does; for notebooks. `config` is a config file's get_config()."""
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.kaggle.session.open import open_session
    from jgpt.training.start import train as start_training

    set_up_logging()
    with open_session(config) as (config, on_saved):
        start_training(config, command or "call train(config) again", on_saved)


def main() -> None:
    """Train the config of the command line."""
    arguments = [a for a in sys.argv[1:] if not a.startswith("--config.checkpoint.resume")]
    train(load_config(), shlex.join(["python", "-m", "jgpt.train", *arguments]))


if __name__ == "__main__":
    define_config()
    run(main, __doc__)
