"""Whether JAX sees the TPU chips of this machine, and has the library that runs them.

Beside the data path: `machine.py` asks where there are TPU chips; `jgpt.check_env` prints the answers.
"""

import os
from collections.abc import Sequence
from importlib import metadata

from jgpt.checks.verdict import Check

CHIPS = "TPU chips"  # the name of the check
ONE_PROCESS = "end the process that holds them: only one at a time can use a TPU"


def install() -> str:
    """Return the command that installs the libtpu of this JAX."""
    return f'pip install "jax[tpu]=={metadata.version("jax")}"'


def libtpu() -> Check:
    """Check that libtpu is installed, without which JAX sees no TPU."""
    try:
        return Check("libtpu", "ok", metadata.version("libtpu"))
    except metadata.PackageNotFoundError:
        return Check("libtpu", "FAIL", "not installed: JAX cannot use a TPU without it", install())


def chips(kinds: Sequence[str], in_machine: int) -> list[Check]:
    """Check that JAX sees all the chips in the machine; `kinds` are those it sees. Returns [] where all is well."""
    if not kinds:
        value = f"{in_machine} in the machine, none seen by JAX"
        platforms = os.environ.get("JAX_PLATFORMS")
        if platforms:
            return [Check(CHIPS, "warn", value, f"unset JAX_PLATFORMS (it is {platforms})")]
        return [Check(CHIPS, "FAIL", value, f"{ONE_PROCESS}; or {install()}")]
    if len(kinds) < in_machine:
        fix = "unset TPU_VISIBLE_CHIPS TPU_VISIBLE_DEVICES TPU_PROCESS_BOUNDS"
        return [Check(CHIPS, "warn", f"JAX sees {len(kinds)} of {in_machine}", fix)]
    return []
