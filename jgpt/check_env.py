"""Say whether training can work on this machine, how fast, what is missing, and the command that fixes it.

    python -m jgpt.check_env [--run_dir DIR] [--json] [--quick]

Exit code 0: training can work (warnings allowed); 2: something must be fixed first. The value of a secret is never
shown.

Beside the data path: run it first on a new machine.
"""

import sys

from jgpt.checks.software import cannot_import
from jgpt.checks.verdict import report

try:
    from absl import flags

    from jgpt.cli.run import run
except ImportError as error:  # not even flags can be read
    if __name__ != "__main__":
        raise
    sys.exit(report(cannot_import(error), as_json="--json" in sys.argv))


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("run_dir", ".", "where a run would write: its disk is checked")
    flags.DEFINE_bool("json", False, "print one JSON object")
    flags.DEFINE_bool("quick", False, "leave out the measurements of speed and the connection")


def main() -> int:
    """Check, print, and return the exit code."""
    args = flags.FLAGS
    try:
        # Here, as all that loads JAX: --help must not wait for it.
        from jgpt.checks.machine import check_all
        from jgpt.config.files import user_path
        from jgpt.kaggle.session import checks as kaggle
        from jgpt.kaggle.session.paths import on_kaggle
    except (ImportError, RuntimeError) as error:  # RuntimeError: jax beside a jaxlib that does not fit it
        return report(cannot_import(error), args.json)
    return report(check_all(user_path(args.run_dir), args.quick, kaggle if on_kaggle() else None), args.json)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
