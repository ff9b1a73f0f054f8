"""How many steps fit in some hours.

Beside the data path: a plan asks with predicted seconds, training with measured ones.
"""

import math

USED = 0.97  # of the hours; the rest is spare: samples, saving, a machine that slows down


def steps_that_fit(
    hours: float,
    step_seconds: float,
    *,
    evaluation_seconds: float = 0.0,
    evaluate_every: int = 1,
    start_seconds: float = 0.0,
    session_hours: float = 0.0,
) -> int:
    """Return how many optimizer steps fit in `hours`, evaluations and starts counted.

    `start_seconds` is what a session takes beside its steps: to start, to compile, to save at its end. A session is
    `session_hours` long, 0 for no limit.

    >>> steps_that_fit(1.0, 1.0), steps_that_fit(1.0, 1.0, evaluation_seconds=50.0, evaluate_every=100)
    (3492, 2294)
    >>> steps_that_fit(20.0, 10.0, start_seconds=600.0, session_hours=11.0)
    6864
    """
    sessions = math.ceil(hours / session_hours) if session_hours else 1
    seconds = hours * 3600 * USED - sessions * start_seconds - evaluation_seconds  # the one before the first step
    return max(0, int(seconds / (step_seconds + evaluation_seconds / evaluate_every)))
