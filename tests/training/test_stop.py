"""Signals and the deadline, asked about between steps."""

import os
import signal
import threading
from contextlib import suppress

import pytest

from jgpt.training.stop import Stop, recorded_interrupt


def test_nothing_is_no_reason():
    with Stop(0) as stop:
        assert stop.reason() == "" and stop.reason(1e9) == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_and_the_handlers_come_back(number: signal.Signals):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    with Stop(0) as stop:
        os.kill(os.getpid(), number)
        assert stop.reason() == number.name
        assert stop.reason() == number.name  # for good
    assert before == (
        signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    )  # fmt: skip


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(0) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason() == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_that_python_dropped_while_the_command_started_is_not_lost():
    before = signal.getsignal(signal.SIGINT)
    with recorded_interrupt():
        with Stop(0) as stop:  # none so far
            assert stop.reason() == ""
        with suppress(KeyboardInterrupt):  # as in a callback of the garbage collector
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), Stop(0):
            pytest.fail("the run began")
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_again_changes_nothing():
    with Stop(0) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason() == "SIGTERM"


def test_second_ctrl_c_interrupts_at_once():
    with Stop(0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 0.1)  # Python runs the handler at its next chance
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


def test_deadline_leaves_the_margin():
    now = [100.0]
    stop = Stop(0.5, clock=lambda: now[0])  # until 1900
    assert stop.reason() == "" and stop.reason(1799) == ""
    assert "deadline" in stop.reason(1800)
    now[0] = 1880
    assert stop.reason(19) == "" and "deadline" in stop.reason(21)
    now[0] = 5000
    assert "deadline" in stop.reason()


def test_deadline_counts_from_when_it_was_made():
    now = [0.0]
    stop = Stop(1, clock=lambda: now[0])
    now[0] = 3599
    with stop:
        assert stop.reason() == "" and stop.reason(2)


def test_no_deadline_never_comes():
    assert Stop(0, clock=lambda: 1e12).reason(1e12) == ""


def test_in_a_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with Stop(0) as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.reason()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(before, "")]
