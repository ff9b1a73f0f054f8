"""The terminal: log lines above progress bars, answers on stdout, remarks on stderr, prompts and questions in.

What a model writes, or a file holds, may have control characters, and a terminal obeys them: they clear it, rename its
window, or answer in the user's name. So all text of others goes through `write`, `say` or the log, which spell them out
on a terminal. A pipe or a file gets the text as it is: there it is the result, and a program may need it exactly.

Beside the data path: `run.py` sets the log up, and the commands read and write with the rest.
"""

import io
import logging
import re
import sys
from typing import TextIO

from tqdm import tqdm

from jgpt.config.files import user_path
from jgpt.errors import UserError
from jgpt.redaction import redact

PROMPT = "> "
BLOCK = '"""'  # begins and ends a message of several lines
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 without tab and newline


class TerminalHandler(logging.Handler):
    """Print log records on stdout or stderr, above tqdm's bars instead of through them, and no secret in them."""

    def __init__(self, to_stderr: bool = False) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = sys.stderr if self.to_stderr else sys.stdout
            tqdm.write(shown(redact(self.format(record)), stream), file=stream)
            stream.flush()  # a pipe or a log file holds lines back, and a killed run would lose them
        except Exception:
            self.handleError(record)


def spell_out_controls(text: str) -> str:
    r"""Spell out the control characters of a text, but tabs and ends of lines.

    >>> print(spell_out_controls("\x1b[2J\x9b1m ok\r\n"), end="")
    \x1b[2J\x9b1m ok
    """
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n"))


def shown(text: str, stream: TextIO) -> str:
    """Return text as `stream` should get it: with its control characters spelled out where it is a terminal."""
    return spell_out_controls(text) if stream.isatty() else text


def accept_all_characters() -> None:
    """Let stdout and stderr write what their encoding lacks as an escape such as \\u6f22, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Print text on stdout at once, without a newline."""
    print(shown(text, sys.stdout), end="", flush=True)


def say(line: str) -> None:
    """Print a remark on stderr, so that stdout holds nothing but the result."""
    print(shown(line, sys.stderr), file=sys.stderr, flush=True)


def read_message() -> str:
    """Return the next message of stdin, with a prompt on a terminal; raise EOFError at the end.

    It is a line, or the lines between two marks of three quotes, or what was pasted into a terminal at once.
    """
    text = _read_line()
    if not text.lstrip().startswith(BLOCK):
        return text
    text = text.lstrip().removeprefix(BLOCK)
    while not text.rstrip().endswith(BLOCK):
        try:
            text += "\n" + _read_line()
        except EOFError:
            return text
    return text.rstrip().removesuffix(BLOCK)


def _read_line() -> str:
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            import readline  # gives input() its editing and history; not on Windows
        except ImportError:
            pass
        else:  # what is pasted is one message, however many lines it has (libedit, macOS's, ignores this)
            readline.parse_and_bind("set enable-bracketed-paste on")
        return input(PROMPT)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 ({error.reason}). Allowed: UTF-8. Convert it: iconv -t utf-8") from None
    if not line:
        raise EOFError
    return line.removeprefix("\ufeff").removesuffix("\n")


def read_prompt(given: str | None, file: str | None) -> str:
    """Return the prompt of --prompt, --prompt_file or stdin, without the newline that ends a file or a pipe."""
    if given is not None and file is not None:
        raise UserError("both --prompt and --prompt_file were given. Allowed: one of them. Leave one out.")
    if file is not None:
        try:
            return _decode(user_path(file).read_bytes(), file)
        except OSError as error:
            raise UserError(
                f"--prompt_file={file}: {error.strerror}. Allowed: a file that can be read. Correct the path."
            ) from None
    if given == "-" or (given is None and not sys.stdin.isatty()):
        say("reading the prompt from stdin")
        return _decode(sys.stdin.buffer.read(), "stdin")
    return given or ""


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt in {source} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. Allowed: "
            "UTF-8. Convert it: iconv -f latin1 -t utf-8"
        ) from None
