"""A kernel for Kaggle as a folder: kernel-metadata.json, and the one script that carries the whole project.

Beside the data path: `client.py` pushes the folder. The script begins with the source of `session/bootstrap.py`, which
runs first on Kaggle. Kaggle takes only the script from the folder, so it holds everything in one compressed archive:
jgpt, configs/, the user's config, and the packages that Kaggle's image lacks.
"""

import base64
import importlib.metadata
import inspect
import io
import json
import lzma
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jgpt.atomic_write import atomic_file
from jgpt.errors import UserError
from jgpt.kaggle.session import bootstrap
from jgpt.kaggle.session.machines import TPU_V5E_8
from jgpt.version import __version__

CODE_FILE, METADATA_FILE, KERNEL_FILE = "kernel.py", "kernel-metadata.json", "kernel.json"
MOST_BYTES = 700_000  # of the script: 720,896 were accepted, 2,800,000 answered with HTTP 400
CARRIED_PACKAGES = ("ml_collections",)  # pure Python. Kaggle's image has all others that jgpt needs
NOT_CARRIED = {"__pycache__", "tests", "examples", "conftest.py"}
PROJECT = Path(__file__).parents[3]  # a checkout, or site-packages

# What `kaggle kernels push --accelerator` accepts and jgpt trains on (kaggle-cli docs/kernels.md, February 2026); some
# are for certain competitions only. The P100 is gone: asked for one, Kaggle gives a T4 without a message.
ACCELERATORS = ("NvidiaTeslaT4", "NvidiaTeslaT4Highmem", "NvidiaL4", "NvidiaL4X1", "NvidiaTeslaA100", "NvidiaH100")
ACCELERATORS += ("NvidiaRtxPro6000", TPU_V5E_8, "")  # "": none, a CPU
SLUG = r"[A-Za-z0-9][A-Za-z0-9_-]*/[a-z0-9]+(?:-[a-z0-9]+)*"  # owner/name, as in the address of its page


@dataclass(frozen=True)
class Kernel:
    """What runs on Kaggle: `python -m MODULE ARGUMENTS`, with these inputs mounted.

    `config` is the config file on this machine that `arguments` name by --config, which the script carries; "" where
    the module takes none. `datasets` and `kernels` (whose output is mounted) are "owner/name", `models` are
    "owner/model/framework/variation/version".
    """

    slug: str
    module: str = "jgpt.train"
    arguments: tuple[str, ...] = ()
    config: str = ""
    datasets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    accelerator: str = "NvidiaTeslaT4"
    internet: bool = False
    docker_image: str = ""

    def check(self) -> None:
        """Raise one UserError that names everything that Kaggle would refuse or misread."""
        problems = list(_problems(self))
        if problems:
            raise UserError("this kernel cannot be pushed:\n  - " + "\n  - ".join(problems))


def write_folder(kernel: Kernel, folder: Path) -> Path:
    """Write a kernel's folder, as `kaggle kernels push -p` needs it, and return the path of the script.

    Each file is written completely or not at all. Raises UserError for a kernel that Kaggle would refuse, also when the
    script is too large.
    """
    kernel.check()
    code = code_file(kernel)
    if len(code.encode()) > MOST_BYTES:
        raise UserError(
            f"the script would be {len(code.encode()):,} bytes, and Kaggle takes {MOST_BYTES:,}. It carries jgpt/ and "
            f"configs/ of {PROJECT}, and the config. Take large files out of them, and mount data as a dataset."
        )
    files = {  # JSON in ASCII: Kaggle's own tool reads it in the encoding of the locale
        CODE_FILE: code,
        KERNEL_FILE: json.dumps(asdict(kernel), indent=2) + "\n",
        METADATA_FILE: json.dumps(metadata(kernel), indent=2) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as together:  # each gets its name when all are written
            for name, text in files.items():
                file = together.enter_context(atomic_file(folder / name, "w"))
                file.write(text)
                file.flush()
    except OSError as error:
        raise UserError(
            f"the kernel's folder {folder} cannot be written: {error.strerror or error}. It must be a folder that you"
            " may write in, with room for the script. Name one: --folder=DIR."
        ) from None
    return folder / CODE_FILE


def read_folder(folder: Path) -> Kernel:
    """Read the kernel back from a folder that `write_folder` wrote."""
    path = folder / KERNEL_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        kernel = Kernel(**values)
        for (field, value), default in zip(asdict(kernel).items(), asdict(Kernel("")).values(), strict=True):
            texts = all(isinstance(item, str) for item in value) if isinstance(value, tuple) else True
            if type(value) is not type(default) or not texts:
                raise TypeError(f"{field} is {value!r}")
        return kernel
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read: {reason}. It must be a folder that a push wrote. Name it by --folder, or push"
            " again."
        ) from None


def metadata(kernel: Kernel) -> dict[str, object]:
    """Return kernel-metadata.json (kaggle-cli docs/kernels_metadata.md)."""
    name = kernel.slug.split("/")[1]
    content: dict[str, object] = {
        "id": kernel.slug,
        "title": name.replace("-", " "),  # Kaggle makes the slug from the title
        "code_file": CODE_FILE,
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": kernel.accelerator not in ("", TPU_V5E_8),
        "enable_tpu": kernel.accelerator == TPU_V5E_8,
        "enable_internet": kernel.internet,  # the client's default is true
        "machine_shape": kernel.accelerator,
        "dataset_sources": list(kernel.datasets),
        "competition_sources": [],
        "kernel_sources": list(kernel.kernels),
        "model_sources": list(kernel.models),
        "keywords": [],
    }
    return content | ({"docker_image": kernel.docker_image} if kernel.docker_image else {})


def _problems(kernel: Kernel) -> Iterator[str]:
    """Yield each problem of a kernel as: what was given, what is allowed, what to do."""
    if not re.fullmatch(SLUG, kernel.slug):
        yield (
            f"slug={kernel.slug!r}: it must be owner/name, the name in lower-case letters, digits and single hyphens;"
            " set --slug=YOUR_KAGGLE_NAME/my-run"
        )
    elif not 5 <= len(kernel.slug.split("/")[1]) <= 50:
        yield f"slug={kernel.slug!r}: Kaggle wants 5 to 50 characters after the slash; set another --slug"
    for key, sources in (("dataset", kernel.datasets), ("kernel", kernel.kernels)):
        for source in sources:
            if not re.fullmatch(rf"{SLUG}(?:/\d+)?", source):
                yield f"{key} {source!r}: it must be owner/name, as in the address of its page; set --{key}=OWNER/NAME"
    for source in kernel.models:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+/[\w.-]+/\d+", source):
            yield (
                f"model {source!r}: it must be owner/model/framework/variation/version, the version a number; copy it"
                " from the model's page"
            )
    if kernel.accelerator not in ACCELERATORS:
        known, meant = ", ".join(filter(None, ACCELERATORS)), re.search("tpu|v5", kernel.accelerator, re.IGNORECASE)
        likely = TPU_V5E_8 if meant else "NvidiaTeslaT4"
        yield f"accelerator={kernel.accelerator!r}: it must be {known} or empty; set --accelerator={likely}"
    if kernel.accelerator == TPU_V5E_8 and kernel.docker_image:
        yield (
            f"docker_image={kernel.docker_image!r} with accelerator={TPU_V5E_8!r}: a TPU's machine has an image of its"
            " own, and with any other Kaggle gives a CPU instead, without a word (kaggle-cli issue 1197); leave"
            " --docker_image out, or empty it where an earlier push named one: --docker_image="
        )
    if not re.fullmatch(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", kernel.module):
        yield f"module={kernel.module!r}: it must be the name of a module, such as jgpt.train"
    if kernel.config and not Path(kernel.config.split(":")[0]).is_file():
        yield (
            f"config={kernel.config!r}: there is no such file (current folder: {Path.cwd()}); name one in configs/, or"
            " your own file with get_config()"
        )
    if any(re.match(r"--?config\.out_dir\b", argument) for argument in kernel.arguments):
        yield "--config.out_dir: on Kaggle a run's directory is /kaggle/working/outputs, so leave it out"


def code_file(kernel: Kernel) -> str:
    """Return the script: a header for people, the source of bootstrap.py, the archive, and the call that starts it."""
    archive = base64.b85encode(_archive(_files(kernel))).decode()  # a sixteenth shorter than in base64
    lines = "\n".join(archive[i : i + 120] for i in range(0, len(archive), 120))
    arguments = [_argument_on_kaggle(argument, kernel.config) for argument in kernel.arguments]
    inputs = [("datasets", kernel.datasets), ("models", kernel.models), ("notebooks", kernel.kernels)]
    named = [f"{kind} {name}" for kind, names in inputs for name in names]
    call = f"module={kernel.module!r}, arguments={arguments!r}, inputs={named!r}, "
    call += f"accelerator={kernel.accelerator!r}, internet={kernel.internet}, trains={bool(kernel.config)}"
    return (
        f"# {kernel.slug}: python -m {' '.join([kernel.module, *arguments])}\n"
        f"# Written by jgpt {version()}; do not edit. Below: the source of jgpt/kaggle/session/bootstrap.py, an\n"
        f"# archive of the project with {', '.join(CARRIED_PACKAGES)} beside it, and on the last line the call.\n"
        f'{inspect.getsource(bootstrap)}\n\nARCHIVE = """\n{lines}\n"""\n'
        f"start(ARCHIVE, {call})\n"
    )


def version() -> str:
    """Return jgpt's version, in a checkout with the commit, and with a "+" where files were changed since."""
    try:
        git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    own = (PROJECT / ".git").exists()  # jgpt may be installed inside another project's checkout
    return f"{__version__} ({commit})" if commit and own else __version__


def _files(kernel: Kernel) -> dict[str, Path]:
    """List the files that the script carries, by their names in the archive."""
    files = {f"jgpt/{name}": path for name, path in _below(PROJECT / "jgpt")}
    if (PROJECT / "pyproject.toml").is_file():  # a checkout
        files |= {f"configs/{name}": path for name, path in _below(PROJECT / "configs")}
        files["pyproject.toml"] = PROJECT / "pyproject.toml"
    for package in CARRIED_PACKAGES:
        files |= {f"packages/{name}": path for name, path in _installed(package)}
    if kernel.config:
        config = Path(kernel.config.split(":")[0])
        files[_path_in_archive(config)] = config
    return files


def _below(folder: Path) -> list[tuple[str, Path]]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return [(path.relative_to(folder).as_posix(), path) for path in files if _is_carried(path.relative_to(folder))]


def _is_carried(path: Path) -> bool:
    return NOT_CARRIED.isdisjoint(path.parts) and not any(part.startswith(".") for part in path.parts)


def _installed(package: str) -> list[tuple[str, Path]]:
    """List the files of an installed pure-Python package, its licence and metadata among them."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        files = None
    if not files:
        raise UserError(
            f"{package} must be installed here: the script carries it, as Kaggle's image lacks it. Run: pip install"
            f" {package}"
        )
    carried = [f for f in files if f.parts[0] != ".." and f.suffix != ".pyc" and _is_carried(Path(f))]
    return [(file.as_posix(), Path(str(file.locate()))) for file in carried if file.name not in ("RECORD", "INSTALLER")]


def _path_in_archive(config: Path) -> str:
    """Return where a config file is in the archive: its path in the project, or own/NAME."""
    try:
        return f"configs/{config.resolve().relative_to(PROJECT.resolve() / 'configs').as_posix()}"
    except ValueError:
        return f"own/{config.name}"


def _argument_on_kaggle(argument: str, config: str) -> str:
    """Return an argument for Kaggle, where the config file has another path; a suffix after a colon is kept."""
    path = config.split(":")[0]
    value = re.sub("^--?config=", "", argument)
    if not path or value.split(":")[0] != path:
        return argument
    return argument.removesuffix(value) + _path_in_archive(Path(path)) + value.removeprefix(path)


def _archive(files: dict[str, Path]) -> bytes:
    """Return the files as a .tar.xz, the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            member, data = tarfile.TarInfo(name), files[name].read_bytes()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), preset=9)
