"""Predict what a config takes before you run it: memory, speed, hours and disk, on a GPU that need not be here.

    python -m jgpt.plan --config configs/gpt2_124m.py --device t4x2
    python -m jgpt.plan --config configs/gpt2_124m.py --device t4x2 --tune

The step that training would run is compiled for the device. XLA says how much memory it takes; a roofline over the
compiled program says how long it takes at least, with the rates that are printed. It is a prediction: nothing runs, and
no text is read. It needs no GPU and no driver, only JAX's CUDA wheels of jax's version: pip install jgpt[plan]. For
Kaggle's TPU, --device v5e8, it needs libtpu: pip install jgpt[plan-tpu].

Exit code 0: it fits; 3: it would run out of memory, and the answer says what fits.
"""

import json

from absl import flags

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.run import EXIT_DONE, EXIT_MEMORY, run
from jgpt.cli.terminal import say
from jgpt.config.check import check


def define_flags() -> None:
    """Define the flags."""
    define_config()
    flags.DEFINE_string(
        "device", "t4x2", "what to plan for: a GPU such as t4x2, t4, l4, a100, h100; a TPU, v5e8; or this: what is here"
    )
    flags.DEFINE_bool("tune", False, "search micro-batch, remat and loss chunk for the fastest step that fits")
    flags.DEFINE_bool("json", False, "print one JSON object")
    flags.DEFINE_integer("top", 10, "how many kinds of op to list", lower_bound=0)
    flags.DEFINE_float("run_hours", None, "hours that one run may take; else as on Kaggle: 12, on a TPU 9")
    flags.DEFINE_float("weekly_hours", None, "hours that a week has; else as on Kaggle: 30, on a TPU 20")


def main() -> int:
    """Compile, print, and return the exit code."""
    import jax  # here, as all that loads JAX: --help must not wait for it

    from jgpt.hardware.process import set_up_process
    from jgpt.kaggle.session.machines import GPU, TPU
    from jgpt.planning.devices import THIS
    from jgpt.planning.devices.tpu import TPU_TARGETS
    from jgpt.planning.estimate import Estimate
    from jgpt.planning.page import as_dict, page, tried_row
    from jgpt.planning.summary import make_plan

    args, config = flags.FLAGS, load_config()
    if args.device != THIS:
        jax.config.update("jax_platforms", "cpu")  # there is no driver for a GPU that is not here
    lent = TPU if args.device in TPU_TARGETS else GPU
    set_up_process(config.execution.deterministic)
    check(config)

    def print_progress(found: Estimate) -> None:
        say(f"compiled in {found.compile_seconds:.0f} s: {tried_row(found)}")

    plan = make_plan(
        config,
        args.device,
        tune=args.tune,
        run_hours=args.run_hours or lent.session_hours,
        weekly_hours=args.weekly_hours or lent.weekly_hours,
        on_compiled=print_progress,
    )
    print(json.dumps(as_dict(plan, args.top), indent=2) if args.json else page(plan, args.top))
    return EXIT_DONE if plan.fits else EXIT_MEMORY


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
