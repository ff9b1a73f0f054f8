"""Say what a config takes before an hour is spent on it: memory, speed, hours and disk, on a GPU that need not be here.

    python -m jgpt.plan --config configs/gpt2_124m.py --device t4x2
    python -m jgpt.plan --config configs/gpt2_124m.py --device t4x2 --tune

The step that training would run is compiled for the device. XLA says what it takes of the memory; a roofline over the
compiled program says how long it takes at least, with the rates that are printed. It is a prediction: nothing runs. No
GPU and no driver are needed, but JAX's CUDA wheels of jax's version: pip install jgpt[plan]. No text is read.

Exit code 0: it fits; 3: it would run out of memory, and the answer says what fits; 2: the user's input.
"""

import json
import sys

import jax
from absl import flags

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.run import EXIT_DONE, EXIT_MEMORY, run
from jgpt.config.check import check
from jgpt.hardware.process import set_up_process
from jgpt.planning.devices import TARGETS, THIS
from jgpt.planning.estimate import Estimate
from jgpt.planning.page import as_dict, page, tried_row
from jgpt.planning.summary import make_plan


def define_flags() -> None:
    """Define the flags; not at import, because absl takes a name once a process."""
    define_config()
    flags.DEFINE_string("device", "t4x2", f"what to plan for: {', '.join(TARGETS)}, or {THIS} (what is here)")
    flags.DEFINE_bool("tune", False, "search micro-batch, remat and loss chunk for the fastest step that fits")
    flags.DEFINE_bool("json", False, "print one JSON object")
    flags.DEFINE_integer("top", 10, "how many kinds of op to list", lower_bound=0)
    flags.DEFINE_float("run_hours", 12.0, "hours that one run may take, where the config has no deadline")
    flags.DEFINE_float("weekly_hours", 30.0, "GPU hours that a week has")


def main() -> int:
    """Compile, print, and return the exit code."""
    args, config = flags.FLAGS, load_config()
    if args.device != THIS:
        jax.config.update("jax_platforms", "cpu")  # there is no driver for a GPU that is not here
    set_up_process()
    check(config)

    def print_progress(found: Estimate) -> None:
        print(f"compiled in {found.compile_seconds:.0f} s: {tried_row(found)}", file=sys.stderr)

    plan = make_plan(
        config,
        args.device,
        tune=args.tune,
        run_hours=args.run_hours,
        weekly_hours=args.weekly_hours,
        on_compiled=print_progress,
    )
    print(json.dumps(as_dict(plan, args.top), indent=2) if args.json else page(plan, args.top))
    return EXIT_DONE if plan.fits else EXIT_MEMORY


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
