"""The errors that a user may see: each ends a command with one clear message and an exit code of its own.

Beside the data path: every room raises them, and `cli/run.py` prints them.
"""


class UserError(ValueError):
    """A mistake that the user can mend: the commands print it without a traceback and exit with 2.

    The message says three things: what was given, what is allowed, what to do.
    """


class OutOfMemory(RuntimeError):
    """There is not as much memory as was asked for; the message says what to change. The commands exit with 3."""


class TrainingDiverged(RuntimeError):
    """The gradient is no longer finite, and neither waiting nor a smaller loss scale helped."""
