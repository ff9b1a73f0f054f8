"""What all commands share: flags in; text, one clear message and an exit code out.

Beside the data path: the commands (`python -m jgpt.NAME`) are the only callers.
"""

import errno
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable

from absl import flags

from jgpt.cli.flags import asks_for_help, parse_flags
from jgpt.cli.help import help_text
from jgpt.cli.terminal import TerminalHandler
from jgpt.errors import OutOfMemory, TrainingDiverged, UserError
from jgpt.redaction import redact

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_MEMORY, EXIT_DIVERGED = 0, 1, 2, 3, 4


def run(main: Callable[..., int | None], doc: str | None) -> None:
    """Run a command: parse its flags, call `main`, exit with 0 done or stopped on purpose, 2 the user's input,
    3 out of memory, 4 training diverged, 1 a bug of ours (the only one that shows a traceback).

    What is no flag goes to `main`, which may take as many arguments as it has parameters, each a string with a
    default. `doc` is the command's docstring, which heads its --help.
    """
    set_up_logging(to_stderr="config" not in flags.FLAGS)  # what such a command prints is its result
    try:
        if asks_for_help():
            print(help_text(doc or ""))
            code = EXIT_DONE
        else:
            code = main(*parse_flags(len(inspect.signature(main).parameters))) or EXIT_DONE
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        code, message = EXIT_USER, str(error)
    except OutOfMemory as error:
        code, message = EXIT_MEMORY, str(error)
    except TrainingDiverged as error:
        code, message = EXIT_DIVERGED, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # the reader of a pipe went away: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        sys.exit(EXIT_DONE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _print_error(traceback.format_exc())
            sys.exit(EXIT_BUG)
        code, message = EXIT_USER, f"the disk is full: {error}. Make room, then run the same command again: it goes on."
    except Exception as error:
        from jgpt.hardware.memory import shortage  # here: it loads JAX, which --help does without

        code, message = EXIT_MEMORY, shortage(error)
        if not message:
            _print_error(traceback.format_exc())
            sys.exit(EXIT_BUG)
        message += ". Take fewer or shorter sequences at a time, or a smaller model; the flags are in --help."
    _print_error(f"error: {message}\n")
    sys.exit(code)


def _print_error(text: str) -> None:
    """Print on stderr, without the secrets that an exception of a library may quote."""
    print(redact(text), file=sys.stderr, end="")


def set_up_logging(to_stderr: bool = False) -> None:
    """Send the log of jgpt to the terminal as plain lines, once."""
    log = logging.getLogger("jgpt")
    if not log.handlers:
        log.addHandler(TerminalHandler(to_stderr))
        log.setLevel(logging.INFO)
        log.propagate = False
