"""The errors that a user may see. Each ends a command with one clear message and an exit code of its own.

Beside the data path: every room raises them, and `cli/run.py` prints them.
"""

import errno

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_MEMORY, EXIT_DIVERGED = 0, 1, 2, 3, 4
EXIT_LOST = 5  # another process of the run has ended
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _Plain(Exception):
    """An error whose message says all that a user needs."""

    exit_code = EXIT_BUG

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: IPython asks an exception for it, and shows a traceback otherwise."""
        return [f"{type(self).__name__}: {self}"]


class UserError(_Plain, ValueError):
    """A mistake that the user can fix. The commands print its message without a traceback, and exit with 2.

    The message says three things: what was given, what is allowed, what to do.
    """

    exit_code = EXIT_USER


class OutOfMemory(_Plain, RuntimeError):
    """A device has too little memory. The message says what to change; the commands exit with 3."""

    exit_code = EXIT_MEMORY


class TrainingDiverged(_Plain, RuntimeError):
    """The gradients stay inf or NaN, with smaller loss scales too. The commands exit with 4."""

    exit_code = EXIT_DIVERGED


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error of the file system says that no space is left, or none of the user's quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends by an error; that of a full disk is the user's.

    >>> exit_code(UserError("")), exit_code(OSError(errno.ENOSPC, "full")), exit_code(KeyError())
    (2, 2, 1)
    """
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, _Plain):
        return error.exit_code
    return EXIT_USER if is_disk_full(error) else EXIT_BUG
