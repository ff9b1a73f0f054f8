"""When to stop early: a signal, or a deadline that leaves time to save.

In the data path: the loop asks after every step. Stopping is asked for, never forced: the step in hand is finished
first.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("jgpt")


# A closed terminal or ssh session sends SIGHUP; Windows has none.
SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class FirstInterrupt:
    """The handler of SIGINT (Ctrl-C) while a command starts: it interrupts, and remembers that it did.

    Python drops an exception that is raised inside some callbacks, such as those of its garbage collector, and Ctrl-C
    with it. `Stop` asks later whether there was one.
    """

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt


@contextmanager
def recorded_interrupt() -> Iterator[None]:
    """Handle Ctrl-C in this block by a FirstInterrupt (in the main thread), until `Stop` does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, FirstInterrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Stop:
    """A reason to stop, once there is one. As a context manager it listens to SIGNALS (in the main thread).

    SIGHUP that the caller ignores (nohup) stays ignored. A second SIGINT (Ctrl-C twice) is not caught: it interrupts at
    once, and the last checkpoint stays as it is.
    """

    def __init__(self, deadline_hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = clock() + deadline_hours * 3600 if deadline_hours else None
        self._signal = ""
        self._before: dict[signal.Signals, object] = {}

    def reason(self, margin_seconds: float = 0.0) -> str:
        """Return why to stop now, or ""; `margin_seconds` is what the next step, a save and the exit may take."""
        if self._signal:
            return self._signal
        if self._deadline is not None and self._clock() + margin_seconds >= self._deadline:
            return "deadline_hours is near"
        return ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._signal:
            again = " (Ctrl-C again: stop at once, without saving)" if number == signal.SIGINT else ""
            log.info("%s: finishing this step, then saving%s", name, again)
        self._signal = name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if isinstance(before, FirstInterrupt) and before.pressed:
                raise KeyboardInterrupt
            for number in SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] (what signal.signal returned)
        self._before.clear()
