"""When to stop early: a signal, or a deadline that leaves time to save.

In the data path: the loop asks after every step. Stopping is asked for, never forced: the step in hand is finished
first.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("jgpt")


class Stop:
    """A reason to stop, once there is one. As a context manager it listens to SIGTERM and SIGINT (in the main thread).

    A second SIGINT (Ctrl-C twice) is not caught: it interrupts at once, and the last checkpoint stays as it is.
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
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] (what signal.signal returned)
        self._before.clear()
