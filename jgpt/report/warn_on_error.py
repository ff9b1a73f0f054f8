"""A guard around pictures and reports: an error becomes a warning, and training continues.

Beside the data path: `curves.py` and `page.py` write their files inside it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("jgpt")


@contextmanager
def warn_on_error(file: str) -> Iterator[None]:
    """Log any exception of the block as one warning that names `file`. A run must not fail because of a picture."""
    try:
        yield
    except Exception as error:
        log.warning("%s could not be written, training continues: %s: %s", file, type(error).__name__, error)
