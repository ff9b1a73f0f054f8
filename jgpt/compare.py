"""Compare several runs: one table, and their curves in one picture.

    python -m jgpt.compare runs/a runs/b
    python -m jgpt.compare runs/* --out all.png

The table has the best and the last validation loss of each run, bits per byte, steps, tokens, time and speed, and where
their configs differ. Runs are compared by loss where they have the same tokenizer and validation text, else by bits per
byte. The picture needs matplotlib: pip install "jgpt[plot]". Only the runs' own files are read: nothing is measured.
"""

import importlib.util
import sys

from absl import flags

from jgpt.cli.run import run
from jgpt.config.files import user_path


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("out", "compare.png", "the picture: a .png, .svg or .pdf file; '': none")
    flags.DEFINE_bool("json", False, "print one JSON object")


def main(*runs: str) -> None:
    """Read, print, draw."""
    # Here, as what loads JAX or NumPy: --help must not wait for it.
    from jgpt.cli.terminal import say, write
    from jgpt.redaction import redact
    from jgpt.report.compare_picture import check_picture, draw
    from jgpt.report.comparison import compare
    from jgpt.wording import json_text

    args, out = flags.FLAGS, user_path(flags.FLAGS.out)
    if args.out:
        check_picture(out)
    found = compare(runs)
    text = json_text(found.as_dict(), sys.stdout.encoding) if args.json else found.as_text()
    write(redact(text) + "\n")
    if not args.out:
        return
    if importlib.util.find_spec("matplotlib") is None:
        say('no picture: matplotlib is not installed. To have one: pip install "jgpt[plot]"')
        return
    draw(found, out)
    say(f"picture: {out}")


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
