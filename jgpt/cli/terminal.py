"""Lines on the terminal: the log of a command, above progress bars.

Beside the data path: `run.py` sets it up.
"""

import logging
import sys

from tqdm import tqdm

from jgpt.redaction import redact


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
