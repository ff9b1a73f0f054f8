"""Predict what a config takes before you run it: memory, speed, hours and disk, on devices that need not be here.

    python -m jgpt.plan --config configs/gpt2_124m.py --device t4x2
    python -m jgpt.plan --config configs/gpt2_124m.py --device t4x2 --tune

The step that training would run is compiled for the device. XLA says how much memory it takes; a roofline over the
compiled program says how long it takes at least, with the rates that are printed. It is a prediction: nothing runs, and
no text is read. It needs no GPU and no driver, only JAX's CUDA wheels of jax's version: pip install jgpt[plan]. For
Kaggle's TPU, --device v5e8, it needs libtpu: pip install jgpt[plan-tpu].

Exit code 0: it fits; 3: it would run out of memory, and the answer says what fits.
"""

import sys

from absl import flags

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.run import run
from jgpt.cli.terminal import say
from jgpt.config.check import check
from jgpt.errors import EXIT_DONE, EXIT_MEMORY, UserError


def define_flags() -> None:
    """Define the flags."""
    define_config()
    flags.DEFINE_string(
        "device",
        "t4x2",
        "what to plan for: a GPU (t4x2, t4, p100, l4, l4x4, a100, h100, h100x8), a TPU (v5e8), or this: what is here",
    )
    flags.DEFINE_integer("hosts", 1, "how many machines with these devices work together", 1, 1024)
    flags.DEFINE_float("network_gb", 12.5, "GB (1e9 bytes) a second that a machine sends to the others", 1e-3)
    flags.DEFINE_bool("tune", False, "search micro-batch, remat and loss chunk for the fastest step that fits")
    flags.DEFINE_bool("json", False, "print one JSON object")
    flags.DEFINE_integer("top", 10, "how many kinds of op to list", lower_bound=0)
    flags.DEFINE_float("run_hours", None, "hours of a run without a deadline; where Kaggle lends it 12, a TPU 9", 0)
    flags.DEFINE_float("weekly_hours", None, "hours that a week has; where Kaggle lends it 30, a TPU 20", 0)


def main() -> int:
    """Compile, print, and return the exit code."""
    import jax  # here, as all that loads JAX: --help must not wait for it

    from jgpt.hardware.process import set_up_process
    from jgpt.kaggle.session.machines import lends
    from jgpt.planning.devices import THIS
    from jgpt.planning.estimate import Estimate
    from jgpt.planning.page import as_dict, page, tried_row
    from jgpt.planning.summary import make_plan
    from jgpt.wording import json_text

    args, config = flags.FLAGS, load_config()
    if args.hosts > 1 and args.device == THIS:
        raise UserError(
            f"--hosts={args.hosts} with --device=this: a plan for several machines needs the name of their devices."
            " Allowed: --hosts=1, or a name, as --device=h100x8."
        )
    lent = lends(args.device)
    session_hours, weekly_hours = (lent.session_hours, lent.weekly_hours) if lent else (0.0, 0.0)
    if args.device != THIS:
        jax.config.update("jax_platforms", "cpu")  # there is no driver for a device that is not here
    set_up_process(config.execution.deterministic)
    check(config)

    def print_progress(found: Estimate) -> None:
        say(f"compiled in {found.compile_seconds:.0f} s: {tried_row(found)}")

    plan = make_plan(
        config,
        args.device,
        hosts=args.hosts,
        network=1e9 * args.network_gb,
        tune=args.tune,
        run_hours=session_hours if args.run_hours is None else args.run_hours,
        weekly_hours=weekly_hours if args.weekly_hours is None else args.weekly_hours,
        on_compiled=print_progress,
    )
    print(json_text(as_dict(plan, args.top), sys.stdout.encoding) if args.json else page(plan, args.top))
    return EXIT_DONE if plan.fits else EXIT_MEMORY


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
