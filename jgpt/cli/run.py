"""What all commands share: flags in; text, one clear message and an exit code out.

Beside the data path: the commands (`jgpt NAME`, `python -m jgpt.NAME`) are the only callers.
"""

import atexit
import contextlib
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from jgpt.cli.flags import asks_for_help, parse_flags
from jgpt.cli.help import help_text
from jgpt.cli.terminal import TerminalHandler, accept_all_characters, shown
from jgpt.config.defaults import KEYS
from jgpt.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_MEMORY,
    OutOfMemory,
    TrainingDiverged,
    UserError,
    exit_code,
    storage_trouble,
)
from jgpt.redaction import redact
from jgpt.training.stop import recorded_interrupt


def run(main: Callable[..., int | None], doc: str | None) -> None:
    """Run a command: parse its flags, call `main`, and exit with one of the codes that --help lists.

    Arguments that are not flags go to `main`: at most one for each of its parameters, which are strings with defaults,
    or as many as there are where it takes `*names`.
    `doc` is the command's docstring, the beginning of its --help. Only a bug of ours shows a traceback.
    """
    try:
        with recorded_interrupt():
            set_up_logging(to_stderr="config" not in flags.FLAGS)  # what such a command prints is its result
            if asks_for_help():
                print(help_text(doc or ""))
                code = EXIT_DONE
            else:
                code = main(*parse_flags(_most_arguments(main))) or EXIT_DONE
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        code, message = exit_code(error), _with_flags(str(error))
    except (OutOfMemory, TrainingDiverged) as error:
        code, message = exit_code(error), str(error)
    except KeyboardInterrupt as error:
        code, message = exit_code(error), "interrupted"
    except BrokenPipeError:  # the reader of a pipe went away: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        sys.exit(EXIT_DONE)
    except OSError as error:
        code, message = exit_code(error), storage_trouble(error)
        if not message:
            _print_error(traceback.format_exc())
            _leave(EXIT_BUG)
    except Exception as error:
        from jgpt.hardware.memory import shortage  # here: it loads JAX, which --help does without

        code, message = EXIT_MEMORY, shortage(error)
        if not message:
            _print_error(traceback.format_exc())
            _leave(EXIT_BUG)
        message += ". Take fewer or shorter sequences at a time, or a smaller model; the flags are in --help."
    _print_error(f"error: {message}\n")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit with `code`. Where a computation or another process of the run may be waiting, nothing is cleaned up."""
    jax = sys.modules.get("jax")
    if code == EXIT_INTERRUPTED or (jax is not None and jax.distributed.is_initialized()):
        atexit.register(exit_at_once, code)  # runs before what was registered earlier, by JAX
    sys.exit(code)


def _most_arguments(main: Callable[..., int | None]) -> int:
    parameters = inspect.signature(main).parameters.values()
    return sys.maxsize if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters)


def exit_at_once(code: int) -> None:
    """End the process here: a computation may still run, and its memory must not be freed under it.

    JAX would also wait for the other processes of a run, which wait for this one.
    """
    with contextlib.suppress(OSError):  # nobody may be reading any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _with_flags(message: str) -> str:
    """Say how a key of the config is set, after a message that names one and does not say it.

    Only the commands know: the rooms below name keys, and not the flags of a command.
    """
    named = [key for key in KEYS if "." in key and re.search(rf"\b{re.escape(key)}\b", message)]
    if not named or "--config" in message or "get_config()" in message:
        return message
    if "config" in flags.FLAGS:
        return f"{message}\nSet a key by --config.KEY=VALUE, or in the config file."
    names = [(key, key.rpartition(".")[2]) for key in named]
    here = ", ".join(f"{key} is --{name}" for key, name in names if name in flags.FLAGS)
    return f"{message}\nIn this command {here}." if here else message


def _print_error(text: str) -> None:
    """Print on stderr, without the secrets that an exception of a library may quote."""
    print(shown(redact(text), sys.stderr), file=sys.stderr, end="")


def only_errors() -> None:
    """Log nothing but errors from now on: another process of the run says the rest."""
    logging.getLogger("jgpt").setLevel(logging.ERROR)


def set_up_logging(to_stderr: bool = False) -> None:
    """Send the log of jgpt to the terminal as plain lines, once; no character makes it fail."""
    accept_all_characters()
    log = logging.getLogger("jgpt")
    if not log.handlers:
        log.addHandler(TerminalHandler(to_stderr))
        log.setLevel(logging.INFO)
        log.propagate = False
