"""The clock beside what takes long: a line of a terminal that changes, lines of a log, nothing where it is quick."""

import io
import logging
import threading
from itertools import count

import pytest

from jgpt import waiting as module
from jgpt.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def quick(monkeypatch):
    """Look at the clock at once; each look is ten seconds later."""
    monkeypatch.setattr(module, "TICK", 0.0005)
    now = count(0, 10)
    return lambda: float(next(now))


def until(condition) -> None:
    """Wait for another thread."""
    for _ in range(20_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came")


def test_a_terminal_shows_a_clock_and_nothing_is_left_of_it(quick):
    terminal = Terminal()
    with waiting("compiling the step", terminal, quick):
        until(lambda: "compiling the step ... 0:50" in terminal.getvalue())
    assert "compiling the step ... 0:40" in terminal.getvalue() and "\n" not in terminal.getvalue().rstrip("\n")
    assert terminal.getvalue().rstrip("\r").endswith(" " * 20) or terminal.getvalue().endswith("\r")


def test_a_log_file_gets_a_line_now_and_then(quick, caplog):
    caplog.set_level(logging.INFO, "jgpt")
    with waiting("compiling", io.StringIO(), quick):
        until(lambda: len(caplog.messages) >= 3)
    assert caplog.messages[:3] == ["compiling ... 0:30", "compiling ... 1:00", "compiling ... 2:00"]


def test_what_is_quick_says_nothing_and_an_error_passes(caplog):
    caplog.set_level(logging.INFO, "jgpt")
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), waiting("compiling", stream):
        raise ZeroDivisionError
    assert caplog.messages == [] and stream.getvalue() == "" and threading.active_count() < 50
