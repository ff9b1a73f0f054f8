"""The terminal: log lines above progress bars, answers on stdout, remarks on stderr, prompts and questions in.

Beside the data path: `run.py` sets the log up, and the commands read and write with the rest.
"""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from jgpt.errors import UserError
from jgpt.redaction import redact

PROMPT = "> "


class TerminalHandler(logging.Handler):
    """Print log records on stdout or stderr, above tqdm's bars instead of through them, and no secret in them."""

    def __init__(self, to_stderr: bool = False) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = sys.stderr if self.to_stderr else sys.stdout
            encoding = stream.encoding or "utf-8"
            # A sample may hold what an ASCII terminal cannot show: better an escape than a lost line.
            tqdm.write(redact(self.format(record)).encode(encoding, "backslashreplace").decode(encoding), file=stream)
            stream.flush()  # a pipe or a log file holds lines back, and a killed run would lose them
        except Exception:
            self.handleError(record)


def write(text: str) -> None:
    """Print text on stdout at once, without a newline."""
    print(text, end="", flush=True)


def say(line: str) -> None:
    """Print a remark on stderr, so that stdout holds nothing but the result."""
    print(line, file=sys.stderr, flush=True)


def read_line() -> str:
    """Return the next line of stdin, with a prompt on a terminal; raise EOFError at the end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            import readline  # noqa: F401  (gives input() its editing and history; not on Windows)
        except ImportError:
            pass
        return input(PROMPT)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8 ({error.reason}). Allowed: UTF-8. Convert it: iconv -t utf-8") from None
    if not line:
        raise EOFError
    return line


def read_prompt(given: str | None, file: str | None) -> str:
    """Return the prompt of --prompt, --prompt_file or stdin, without the newline that ends a file or a pipe."""
    if given is not None and file is not None:
        raise UserError("both --prompt and --prompt_file were given. Allowed: one of them. Leave one out.")
    if file is not None:
        try:
            return _decode(Path(file).read_bytes(), file)
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
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt in {source} is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}. Allowed: "
            "UTF-8. Convert it: iconv -f latin1 -t utf-8"
        ) from None
