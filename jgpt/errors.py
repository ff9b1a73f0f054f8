"""The errors that a user may see. Each ends a command with one clear message and an exit code of its own.

Beside the data path: every room raises them, and `cli/run.py` prints them.
"""


class _Plain(Exception):
    """An error whose message says all that a user needs."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: IPython asks an exception for it, and shows a traceback otherwise."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_Plain, ValueError):
    """A mistake that the user can fix. The commands print its message without a traceback, and exit with 2.

    The message says three things: what was given, what is allowed, what to do.
    """


class OutOfMemory(_Plain, RuntimeError):
    """A device has too little memory. The message says what to change; the commands exit with 3."""


class TrainingDiverged(_Plain, RuntimeError):
    """The gradients stay inf or NaN, with smaller loss scales too. The commands exit with 4."""
