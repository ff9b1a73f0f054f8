"""Show what the user waits for, with a clock: a compile gives no other sign of life for minutes.

Beside the data path: training and the commands put it around their first calls.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

TICK = 1.0  # seconds between two looks at the clock
FIRST_LINE = 30.0  # seconds until a line is logged where there is no terminal; the next one after twice as many

log = logging.getLogger("jgpt")


@contextmanager
def waiting(what: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Show `what` with a clock while this block runs: on a terminal a line that vanishes, else a log line now and then.

    `stream` is where a terminal is looked for: stdout where it is not given.
    """
    place: TextIO = stream or sys.stdout
    done = threading.Event()
    show = _on_terminal if place.isatty() else _in_log
    thread = threading.Thread(target=show, args=(what, done, place, clock), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _on_terminal(what: str, done: threading.Event, stream: TextIO, clock: Callable[[], float]) -> None:
    began = clock()
    with tqdm(file=stream, leave=False, bar_format="{desc}", dynamic_ncols=True) as line:
        while not done.wait(TICK):
            line.set_description_str(f"{what} ... {format_clock(clock() - began)}")


def _in_log(what: str, done: threading.Event, stream: TextIO, clock: Callable[[], float]) -> None:
    began, due = clock(), FIRST_LINE
    while not done.wait(TICK):
        if (passed := clock() - began) >= due:
            log.info("%s ... %s", what, format_clock(passed))
            due = 2 * passed


def format_clock(seconds: float) -> str:
    """Write seconds as a clock.

    >>> format_clock(42.9), format_clock(252), format_clock(3723)
    ('0:42', '4:12', '1:02:03')
    """
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
