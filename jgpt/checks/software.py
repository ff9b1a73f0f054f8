"""Whether the software here is what jgpt needs.

Beside the data path: `jgpt.check_env` prints it. Only the standard library is imported: it runs on a machine where a
package is missing or broken, and says so.
"""

import operator
import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from jgpt.checks.verdict import Check

JGPT_FOLDER = Path(__file__).parents[2]
MIN_PYTHON = (3, 11)
EXTRAS = {"plot": "draws loss.png", "parquet": "reads .parquet text", "zstd": "reads .zst text"}


def software() -> list[Check]:
    """Check Python, every package that jgpt needs or can use, and that they fit together."""
    return [*python(), *packages(), *cuda_plugin(), *tensorflow()]


def cannot_import(error: Exception) -> dict[str, list[Check]]:
    """Report the software alone, on a machine where an import failed with `error`."""
    return {"Software": [*software(), Check("imports", "FAIL", str(error), "fix the packages above")]}


def python() -> list[Check]:
    """Check the version of Python."""
    if sys.version_info >= MIN_PYTHON:
        return [Check("Python", "ok", platform.python_version())]
    return [Check("Python", "FAIL", f"{platform.python_version()} (>=3.11)", "install Python 3.11 or newer")]


def packages() -> list[Check]:
    """Check each package against the range that jgpt declares, and jaxlib against jax's."""
    lines = _requirements()
    if lines is None:
        fix = f"pip install --no-deps {JGPT_FOLDER} (without --no-deps where you want its packages as well)"
        return [Check("jgpt", "warn", "not installed, so the ranges of its packages are unknown", fix)]
    lines += [line for line in _requires("jax") or [] if line.startswith("jaxlib") and "extra" not in line]
    checks = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        name, wanted = re.fullmatch(r"([\w.-]+)(?:\[.*?\])?\s*(.*?)\s*", requirement).groups()  # type: ignore[union-attr]
        extra = re.search(r"""extra\s*==\s*['"](\w+)""", marker)
        if extra and extra[1] in EXTRAS:
            checks.append(_package(name, wanted, EXTRAS[extra[1]]))
        elif not extra:
            checks.append(_package(name, wanted))
    return [*checks, _package("tensorstore", "")]  # Orbax's, and the one that writes the checkpoint's bytes


def cuda_plugin() -> list[Check]:
    """Check that JAX's CUDA plugin is of jaxlib's version: JAX ignores another one, and then uses no GPU."""
    checks, jaxlib = [], _version("jaxlib")
    for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        version = _version(name)
        if version and jaxlib and _numbers(version) == _numbers(jaxlib):
            checks.append(Check(name, "ok", version))
        elif version:
            fix = f'pip install "jax[{name.split("-")[1]}]=={_version("jax")}"'
            checks.append(Check(name, "FAIL", f"{version} beside jaxlib {jaxlib}: JAX will not use the GPU", fix))
    return checks


def tensorflow() -> list[Check]:
    """Check that TensorFlow is not loaded: beside it, JAX's all-reduce between two T4s fails (jax issue 39167)."""
    if "tensorflow" not in sys.modules:
        return [Check("TensorFlow", "ok", "not loaded")]
    fix = "run jgpt in a process of its own, without the import of tensorflow, keras or tensorboard"
    return [Check("TensorFlow", "FAIL", "loaded in this process, where it breaks JAX's all-reduce", fix)]


def _package(name: str, wanted: str, purpose: str = "") -> Check:
    """Check one package; one with a `purpose` is optional."""
    version = _version(name)
    asked = f" ({wanted})" if wanted else ""
    if version and _satisfies(version, wanted):
        return Check(name, "ok", version + asked)
    value = f"{version or 'not installed'}{asked}" + (f"; optional: {purpose}" if purpose else "")
    state = "FAIL" if not purpose else "warn" if version else "-"
    return Check(name, state, value, f'pip install "{name}{wanted}"')


def _requirements() -> list[str] | None:
    """Return what jgpt requires, as lines: of the installed package, else of the checkout that it runs from."""
    installed, pyproject = _requires("jgpt"), JGPT_FOLDER / "pyproject.toml"
    if installed is not None or not pyproject.is_file():
        return installed
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return project["dependencies"] + [f'{line}; extra == "{extra}"' for extra, lines in extras for line in lines]


def _requires(package: str) -> list[str] | None:
    try:
        return metadata.requires(package)
    except metadata.PackageNotFoundError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """Return the leading numbers of a version: [0, 7, 2] of "0.7.2.dev1"."""
    return [int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]  # type: ignore[index]


def _satisfies(version: str, wanted: str) -> bool:
    """Say whether a version lies in a range.

    >>> _satisfies("0.10.2", ">=0.7.2"), _satisfies("0.7.2", ">=0.10,<0.12"), _satisfies("2.0.0", "==2")
    (True, False, True)
    """
    compare = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
    for sign, bound in re.findall(r"([<>=]=?)\s*([\w.]+)", wanted):
        ours, theirs = _numbers(version), _numbers(bound)
        length = max(len(ours), len(theirs))
        if not compare[sign](ours + [0] * (length - len(ours)), theirs + [0] * (length - len(theirs))):
            return False
    return True
