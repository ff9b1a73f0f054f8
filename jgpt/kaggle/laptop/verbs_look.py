"""The verbs of `python -m jgpt.kaggle` that show a run or move its output: status, logs, pull, publish.

Beside the data path. A public function without `define_` is a verb, and its docstring is its --help.
"""

import shlex
from pathlib import Path

from absl import flags

from jgpt.cli.terminal import write
from jgpt.config.files import user_path
from jgpt.errors import UserError
from jgpt.kaggle.laptop.download import check_replaceable, download_run
from jgpt.kaggle.laptop.progress import last_progress
from jgpt.kaggle.laptop.verbs import (
    connect,
    define_dry_run,
    define_slug,
    folder_of_flags,
    newest_version,
    slug_of_flags,
)
from jgpt.kaggle.session import publish as publishing


def define_version() -> None:
    """Define the flags of status."""
    define_slug()
    flags.DEFINE_integer("version", None, "the version; default: the newest", lower_bound=1)


def status() -> None:
    """Show the state of a kernel, the progress of its training, and the GPU and TPU hours left this week.

        python -m jgpt.kaggle status --slug me/my-gpt

    The progress is known when a session has ended. To see it before that: `logs --follow`.
    """
    slug = slug_of_flags()
    if flags.FLAGS.dry_run:
        print(f"Would ask for the status of {slug}, the status.json of its last output, and the GPU and TPU hours.")
        return
    kaggle = connect()
    version = flags.FLAGS.version or newest_version(kaggle, slug)
    session = kaggle.status(slug, version)
    print(f"version {version}: {session.state}   https://www.kaggle.com/code/{slug}")
    if session.message:
        write(f"Kaggle says: {session.message}\n")
    progress = last_progress(kaggle, slug, version)
    print(f"last output: {progress}, {progress.trained_hours:.1f} h trained" if progress else "last output: none yet")
    for unit, quota in kaggle.quotas().items():
        print(f"{unit} hours: {quota}")


def define_logs() -> None:
    """Define the flags of logs."""
    define_version()
    flags.DEFINE_bool("follow", False, "print lines as they are written, until the run ends")


def logs() -> None:
    """Print the log of a run: what it wrote to the terminal on Kaggle.

        python -m jgpt.kaggle logs --slug me/my-gpt
        python -m jgpt.kaggle logs --slug me/my-gpt --follow

    Without --follow the log is available when the run has ended. Ctrl-C ends the printing and not the run.
    """
    slug, version = slug_of_flags(), flags.FLAGS.version
    if flags.FLAGS.dry_run:
        print(f"Would print the log of {slug}.")
        return
    kaggle = connect()
    if flags.FLAGS.follow:
        for piece in kaggle.follow_log(slug, version):
            write(piece if piece.endswith("\n") else f"{piece}\n")
        return
    lines = kaggle.log_lines(slug, version)
    log = "\n".join(lines) or "no log yet: it is available when the run has ended, and --follow shows it sooner"
    write(f"{log}\n")


def define_pull() -> None:
    """Define the flags of pull."""
    define_version()
    flags.DEFINE_string("to", "", "the run directory to write; default: run/ in the kernel's folder")


def pull() -> None:
    """Download what a run wrote into a run directory on this machine, as if it had been trained here.

        python -m jgpt.kaggle pull --slug me/my-gpt
        python -m jgpt.generate --model runs/kaggle/me-my-gpt/run --prompt "Once"

    The directory appears, or is replaced, when everything is downloaded. After an interruption, repeat the command: it
    continues the download.
    """
    slug, wanted = slug_of_flags(), flags.FLAGS.version
    target = user_path(flags.FLAGS.to) if flags.FLAGS.to else folder_of_flags() / "run"
    if flags.FLAGS.dry_run:
        print(f"Would download the last output of {slug} and make the run directory {target} of it.")
        return
    check_replaceable(target)
    kaggle = connect()
    version = wanted or newest_version(kaggle, slug)
    progress = last_progress(kaggle, slug, version)
    if progress is None or (wanted and progress.version != wanted):
        raise UserError(
            f"version {version} of {slug} has no output to pull. A run that was not cancelled has one at its end. See:"
            f" python -m jgpt.kaggle status --slug {slug}"
        )
    print(f"pulling {progress}")
    download_run(kaggle, slug, progress.version, target)
    command = f'python -m jgpt.generate --model {shlex.quote(str(target))} --prompt "Once"'
    print(f"{target} is written. To try it:\n    {command}")


def define_publish() -> None:
    """Define the flags of publish."""
    flags.DEFINE_string("to", "", "dataset:OWNER/NAME, model:OWNER/MODEL/FRAMEWORK/VARIATION, hub:OWNER/NAME, gs://...")
    define_dry_run()


def publish(directory: str = "") -> None:
    """Send a run directory or an exported model to a Kaggle dataset or model, to the Hugging Face Hub, or to a bucket.

        python -m jgpt.kaggle publish runs/kaggle/me-my-gpt/run --to dataset:me/my-gpt-run
        python -m jgpt.kaggle publish exported/my-gpt --to hub:me/my-gpt

    A dataset, model or repository that does not exist is created, private; one that exists gets a new version.
    """
    where = flags.FLAGS.to
    if not directory or not where:
        raise UserError(
            f"given was {directory or 'no directory'} and --to={where}. Allowed: DIRECTORY --to WHERE. For example:"
            " python -m jgpt.kaggle publish runs/kaggle/me-my-gpt/run --to dataset:me/my-gpt-run"
        )
    if flags.FLAGS.dry_run:
        _describe(Path(directory), publishing.parse_target(where).url)
        return
    print(f"sent: {publishing.publish(Path(directory), where)}")


def _describe(directory: Path, url: str) -> None:
    """Print what would be sent, and where."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}. Allowed: a run directory or an exported model. Name one.")
    files = [path for path in directory.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"Nothing was sent. Without --dry_run the {len(files)} files of {directory} ({megabytes:,.1f} MB) go to {url}"
    )
