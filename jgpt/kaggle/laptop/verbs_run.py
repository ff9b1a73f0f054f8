"""The verbs of `python -m jgpt.kaggle` that run something on Kaggle: push, resume, chain, doctor.

Beside the data path. A public function without `define_` is a verb, and its docstring is its --help.
"""

import json

from absl import flags

from jgpt.atomic_write import atomic_file
from jgpt.cli.terminal import write
from jgpt.cli.text import columns
from jgpt.errors import UserError
from jgpt.kaggle.laptop.chain import Chain, wait_for_end
from jgpt.kaggle.laptop.kernel import Kernel, write_folder
from jgpt.kaggle.laptop.progress import is_finished, last_progress, write_next
from jgpt.kaggle.laptop.verbs import (
    connect,
    define_kernel_again,
    define_machine,
    define_slug,
    folder_of_flags,
    kernel_again,
    kernel_of_flags,
    push_folder,
    refuse_running,
    show_folder,
    slug_of_flags,
)
from jgpt.kaggle.session.publish import parse_target
from jgpt.kaggle.session.readings import in_short


def push() -> None:
    """Build the kernel of a config and push it to Kaggle, which queues and runs it.

        python -m jgpt.kaggle push --config configs/kaggle_t4.py --slug me/my-gpt --dataset me/my-texts
        python -m jgpt.kaggle push --config configs/kaggle_t4.py --config.seed=2 --slug me/my-gpt-2 --dry_run

    One script is sent. It carries jgpt, the config, and the packages that Kaggle's image lacks. The text comes from the
    datasets.
    """
    kernel, folder = kernel_of_flags(), folder_of_flags()
    write_folder(kernel, folder)
    if flags.FLAGS.dry_run:
        show_folder(folder)
        print(f"Nothing was sent. Without --dry_run this is pushed as the next version of {kernel.slug}.")
        return
    kaggle = connect()
    newest = refuse_running(kaggle, kernel.slug)
    push_folder(kaggle, kernel.slug, folder)
    if newest:
        print(f"note: this starts from step 0. To continue version {newest}, use `resume`")
    print(f"To watch it:\n    python -m jgpt.kaggle logs --follow --slug {kernel.slug}")


def resume() -> None:
    """Push the next version of a run that stopped: its output so far becomes an input, and training continues.

        python -m jgpt.kaggle resume --slug me/my-gpt
        python -m jgpt.kaggle resume --slug me/my-gpt --config configs/kaggle_t4.py --config.optimizer.total_steps=40000

    Everything stays as it was pushed, except what flags change. Refused when the run is finished or still running.
    """
    base, folder = kernel_again(), folder_of_flags()
    write_folder(base, folder)
    if flags.FLAGS.dry_run:
        show_folder(write_next(base, folder, resumes=True))
        print(f"Nothing was sent. Without --dry_run this is pushed, if {base.slug} has stopped before its last step.")
        return
    kaggle = connect()
    progress = last_progress(kaggle, base.slug, refuse_running(kaggle, base.slug))
    if progress is None:
        raise UserError(
            f"no version of {base.slug} has an output to continue from. A run that was not cancelled has one at its"
            " end. To start from step 0: push"
        )
    if is_finished(base, progress):
        raise UserError(
            f"{base.slug} is finished: {progress}. A run can continue when it has steps left. Give it more:"
            f" --config=FILE --config.optimizer.total_steps=N. Or download it: python -m jgpt.kaggle pull --slug"
            f" {base.slug}"
        )
    print(f"continuing from {progress}")
    push_folder(kaggle, base.slug, write_next(base, folder, resumes=progress.step > 0))


def define_chain() -> None:
    """Define the flags of chain."""
    define_kernel_again()
    flags.DEFINE_float("hours", None, "stop when the run has trained for so long, all versions together", lower_bound=0)
    define_poll()


def define_poll() -> None:
    """Define --poll_seconds."""
    flags.DEFINE_float("poll_seconds", 60.0, "how often to ask for the status", lower_bound=1)


def chain() -> None:
    """Train in as many sessions as needed: push a version, wait for its end, push the next one, until it is done.

        python -m jgpt.kaggle chain --config configs/kaggle_t4.py --slug me/my-gpt --dataset me/my-texts --hours 40
        python -m jgpt.kaggle chain --slug me/my-gpt --hours 40

    It ends when the config's steps are done, when the run has trained for --hours in all, or when the week's GPU
    (or TPU) hours are used up; the last session gets an earlier deadline, to use only the hours left. Ctrl-C ends the
    waiting and not the run: the same command waits for it again. A session that failed ends the chain, with the end of
    its log.
    """
    args = flags.FLAGS
    if args.hours is None:
        raise UserError("no --hours was given. Allowed: the hours that the run may train. For example: --hours=40")
    base, folder = kernel_again(), folder_of_flags()
    write_folder(base, folder)
    if args.dry_run:
        show_folder(write_next(base, folder, resumes=False, most_hours=args.hours, run_hours=args.hours))
        print(
            f"Nothing was sent. Without --dry_run this is pushed if {base.slug} has no version yet. Else the command"
            " waits for the version that runs, and pushes the next one from its output, until the steps are done."
        )
        return
    try:
        Chain(connect(), base, folder, args.hours, args.poll_seconds).run()
    except KeyboardInterrupt:
        print("\nThe run on Kaggle continues. The same command waits for it again.")
        raise


def define_doctor() -> None:
    """Define the flags of doctor."""
    define_slug()
    define_machine()
    define_poll()
    flags.DEFINE_string("upload", "", "also test whether the session may write to dataset:OWNER/NAME (with --internet)")


def doctor() -> None:
    """Measure Kaggle's machine with a kernel of some minutes; print the results and keep them as JSON.

        python -m jgpt.kaggle doctor --slug me/jgpt-doctor
        python -m jgpt.kaggle doctor --slug me/jgpt-doctor --internet --upload dataset:me/jgpt-doctor-test

    It measures the speed of the GPUs or TPU chips, between them, and of the disks: see jgpt/kaggle/session/doctor.py.
    """
    args, folder = flags.FLAGS, folder_of_flags()
    if args.upload:
        parse_target(args.upload)
    accelerator = "NvidiaTeslaT4" if args.accelerator is None else args.accelerator
    kernel = Kernel(
        slug_of_flags(), "jgpt.kaggle.session.doctor", (f"--upload={args.upload}",) if args.upload else (),
        accelerator=accelerator, internet=bool(args.internet), docker_image=args.docker_image or "",
    )  # fmt: skip
    write_folder(kernel, folder)
    if args.dry_run:
        show_folder(folder)
        print("Nothing was sent. Without --dry_run this is pushed, waited for, and its doctor.json downloaded.")
        return
    kaggle = connect()
    refuse_running(kaggle, kernel.slug)
    version = push_folder(kaggle, kernel.slug, folder)
    status = wait_for_end(kaggle, kernel.slug, version, args.poll_seconds)
    content = kaggle.read_output(kernel.slug, version, "doctor.json")
    if content is None:
        write("\n".join([*kaggle.log_lines(kernel.slug, version), ""]))
        raise UserError(f"the doctor left no doctor.json ({status.state}). Its log is above. Fix what it names.")
    path = folder / f"doctor-{version}.json"
    with atomic_file(path) as file:
        file.write(content)
    write(columns((part, in_short(value)) for part, value in json.loads(content).items()) + "\n")
    print(f"{path} is written")
