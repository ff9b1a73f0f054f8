"""What the verbs of `python -m jgpt.kaggle` share: flags, the kernel that the flags describe, the connection to Kaggle.

Beside the data path: `verbs_run.py` and `verbs_look.py` hold the verbs, `__main__.py` lists them.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from jgpt.cli.flags import define_config, load_config
from jgpt.config.check import check
from jgpt.config.files import user_path
from jgpt.errors import UserError
from jgpt.exchange.hub import is_hub_name
from jgpt.kaggle.laptop.kernel import KERNEL_FILE, METADATA_FILE, Kernel, read_folder
from jgpt.kaggle.laptop.progress import read_arguments
from jgpt.kaggle.session.limits import with_budget
from jgpt.kaggle.session.machines import machine_of
from jgpt.kaggle.session.publish import parse_target
from jgpt.model.precision import choose_policy

if TYPE_CHECKING:
    from jgpt.kaggle.laptop.client import Kaggle

FOLDERS = Path("runs/kaggle")

# Flags are defined only when the verb is known: absl accepts each name once in a process.


def define_slug() -> None:
    """Define the flags that every verb about a kernel has."""
    flags.DEFINE_string("slug", None, "the kernel on Kaggle: OWNER/NAME, the end of its address")
    flags.DEFINE_string("folder", "", f"where it is kept on this machine; without it {FOLDERS}/OWNER-NAME")
    define_dry_run()


def define_dry_run() -> None:
    """Define --dry_run."""
    flags.DEFINE_bool("dry_run", False, "say what would be done, and do not contact Kaggle")


def define_machine() -> None:
    """Define the flags of the machine that a kernel runs on."""
    machines = "the machine; default: NvidiaTeslaT4 (two T4s); TpuV5E8: a TPU of 8 chips; empty: a CPU"
    flags.DEFINE_string("accelerator", None, machines)
    flags.DEFINE_bool("internet", None, "turn the internet on; your Kaggle account needs a verified phone number")
    flags.DEFINE_string("docker_image", None, "the image to run in, by its digest; default: Kaggle's newest")


def define_kernel() -> None:
    """Define the flags that make a kernel from a config."""
    define_slug()
    define_config()
    flags.DEFINE_multi_string("dataset", None, "a dataset to mount, OWNER/NAME")
    flags.DEFINE_multi_string("model", None, "a model to mount, OWNER/MODEL/FRAMEWORK/VARIATION/VERSION")
    define_machine()


def define_kernel_again() -> None:
    """Define the flags of a kernel that may have been pushed before: --config may be left out."""
    define_kernel()
    asks_for_help = {"-h", "--help", "-help", "--helpfull"} & set(sys.argv)
    if not asks_for_help and not any(argument.startswith(("--config", "-config")) for argument in sys.argv):
        delattr(flags.FLAGS, "config")


def slug_of_flags() -> str:
    """Return --slug; raise UserError where it cannot be a kernel's."""
    slug = flags.FLAGS.slug
    if slug is None:
        raise UserError(
            "no --slug was given. Allowed: OWNER/NAME, your name on Kaggle and a name for the kernel. For example:"
            " --slug=me/my-gpt"
        )
    Kernel(slug).check()
    return slug


def folder_of_flags() -> Path:
    """Return the folder of the kernel on this machine."""
    return user_path(flags.FLAGS.folder) if flags.FLAGS.folder else FOLDERS / slug_of_flags().replace("/", "-")


def kernel_of_flags(earlier: Kernel | None = None) -> Kernel:
    """Return the kernel that the flags describe, the rest as in `earlier`. Its config is checked."""
    args, kernel = flags.FLAGS, earlier or Kernel(slug_of_flags())
    if "config" in args:
        flag = args["config"]
        path = config_flags.get_config_filename(flag)
        overrides = [f"--config.{key}={value}" for key, value in config_flags.get_override_values(flag).items()]
        kernel = replace(kernel, config=path, arguments=(f"--config={path}", *overrides))
    kernel = replace(
        kernel,
        slug=slug_of_flags(),
        datasets=tuple(args.dataset or ()) or kernel.datasets,
        models=tuple(args.model or ()) or kernel.models,
        accelerator=kernel.accelerator if args.accelerator is None else args.accelerator,
        internet=kernel.internet if args.internet is None else args.internet,
        docker_image=kernel.docker_image if args.docker_image is None else args.docker_image,
    )
    kernel.check()
    config = load_config() if "config" in args else read_arguments(kernel.arguments)
    machine = machine_of(kernel.accelerator)
    check(with_budget(config, machine.deadline_hours))  # as the session has it
    machine.check_deadline(config.deadline_hours)
    if machine.unit == "TPU":
        choose_policy(config.precision.compute, config.precision.params, "tpu", None)  # refuses fp16, as training would
    if config.checkpoint.upload:
        parse_target(config.checkpoint.upload)  # Kaggle would refuse it there, when the first upload begins
    if not kernel.internet:
        for note in _needs_internet(config):
            print(f"note: {note}", file=sys.stderr)
    return kernel


def _needs_internet(config: ConfigDict) -> Iterator[str]:
    """Yield what in a config needs the internet, for a session without it."""
    names = {"init_from": config.init_from}
    if config.tokenizer.kind == "hf" and not config.init_from:
        names["tokenizer.pretrained"] = config.tokenizer.pretrained
    for key, name in names.items():
        if is_hub_name(name):
            yield (
                f"{key}={name} is on the Hugging Face Hub, and this session has no internet: add --internet, or mount"
                " it (--model, --dataset) and name its directory there"
            )
    if config.checkpoint.upload:
        yield f"checkpoint.upload={config.checkpoint.upload}, and this session has no internet: add --internet"


def kernel_again() -> Kernel:
    """Return the kernel that was pushed before, changed by the flags; or a new one, where the flags name a config."""
    folder = folder_of_flags()
    if os.path.isfile(folder / KERNEL_FILE):  # unlike Path.exists, it takes a name of any length
        return kernel_of_flags(read_folder(folder))
    if "config" not in flags.FLAGS:
        raise UserError(
            f"{folder} holds no kernel, so what {slug_of_flags()} trains is not known here. The machine that pushed it"
            " has that folder: name it, --folder=DIR. Or name the config and the datasets as for a push: --config=FILE"
        )
    return kernel_of_flags()


def show_folder(folder: Path) -> None:
    """Print the files of a kernel's folder with their sizes, the metadata, and the command that runs on Kaggle."""
    kernel = read_folder(folder)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    print((folder / METADATA_FILE).read_text(encoding="utf-8").rstrip())
    print(f"runs on Kaggle: {shlex.join(['python', '-m', kernel.module, *kernel.arguments])}")


def connect() -> "Kaggle":
    """Sign in to Kaggle; raise UserError where the package or the token is missing."""
    try:
        from jgpt.kaggle.laptop.client import Kaggle  # only here: it needs the kaggle package, which is an extra

        return Kaggle()
    except ImportError as error:
        raise UserError(
            f"the kaggle package, which connects to Kaggle, cannot be imported ({error}). Run: pip install"
            " 'jgpt[kaggle]'"
        ) from None


def newest_version(kaggle: "Kaggle", slug: str) -> int:
    """Return the number of the newest version of a kernel; raise UserError where there is no such kernel."""
    version = kaggle.newest_version(slug)
    if not version:
        raise UserError(
            f"there is no kernel {slug} that your account may read. OWNER/NAME is the end of its address on kaggle.com."
            " Check the spelling, or push it first."
        )
    return version


def refuse_running(kaggle: "Kaggle", slug: str) -> int:
    """Return the number of the newest version, 0 if there is none; raise UserError when it still runs."""
    version = kaggle.newest_version(slug)
    if version and not (status := kaggle.status(slug, version)).ended:
        raise UserError(
            f"version {version} of {slug} is {status.state}, and a second one would use up the week's hours."
            f" Wait for it (logs --follow, or chain), stop it at https://www.kaggle.com/code/{slug}, or use another"
            " --slug."
        )
    return version


def push_folder(kaggle: "Kaggle", slug: str, folder: Path) -> int:
    """Push a kernel's folder, print the version and its address, and return its number."""
    pushed = kaggle.push(slug, folder)
    print(f"version {pushed.version} is pushed: {pushed.url}")
    for note in pushed.notes:
        print(f"note: {note}")
    return pushed.version
