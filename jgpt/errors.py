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


_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_LOST = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO)


def storage_trouble(error: BaseException) -> str:
    """Say what the system refused a command that reads and writes files, and what to do; "" for any other error.

    >>> storage_trouble(OSError(errno.EIO, "Input/output error", "runs/mine/metrics.jsonl"))
    'runs/mine/metrics.jsonl: Input/output error. The disk, or the connection to it, has failed. Bring it back, then run
    the same command again.'
    """
    if is_disk_full(error):
        return f"the disk is full: {error}. Free some space, then run the same command again: it continues."
    if not isinstance(error, OSError):
        return ""
    what = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    if error.errno in _REFUSED and error.filename is not None:
        advice = "jgpt may not read or write there. Change the permissions or the owner (ls -l shows them), or name"
        return f"{what}. {advice} another place."
    if error.errno in _TOO_MANY:
        return f"{what}. Allow more (ulimit -n 4096), then run the same command again."
    if error.errno in _LOST:
        return f"{what}. The disk, or the connection to it, has failed. Bring it back, then run the same command again."
    return ""


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends by an error; what the system refuses is the user's.

    >>> exit_code(UserError("")), exit_code(OSError(errno.ENOSPC, "full")), exit_code(KeyError())
    (2, 2, 1)
    """
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, _Plain):
        return error.exit_code
    return EXIT_USER if storage_trouble(error) else EXIT_BUG
