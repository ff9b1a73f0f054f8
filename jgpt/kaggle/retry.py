"""Calls to Kaggle that may fail for a while: again, a little later; at last one clear message, without secrets.

Beside the data path: `client.py` makes every call through here. Needs requests, which comes with the `kaggle` package.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import requests

from jgpt.errors import UserError
from jgpt.redaction import HIDDEN, redact

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 2.0  # doubled each time: 2, 4, 8, 16, 32, a minute in all
LONGEST_WAIT_SECONDS = 900.0  # when Kaggle asks for more, it is the user who decides

TOKEN_HELP = (
    "Get one at https://www.kaggle.com/settings/api (Generate New Token) and save it in ~/.kaggle/access_token, or set"
    " KAGGLE_API_TOKEN; `kaggle auth login` in a terminal does as well."
)

log = logging.getLogger("jgpt")
T = TypeVar("T")


class NotFound(UserError):
    """Kaggle has no such kernel, version or file, or not for this account: it answers 403 to both."""


class Unauthorized(UserError):
    """Kaggle does not take the token: it may have expired."""


class Patience:
    """How long a call is repeated, and what its errors may show: never one of `secrets`."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self.secrets = sorted(filter(None, secrets), key=len, reverse=True)

    def call(self, what: str, function: Callable[[], T]) -> T:
        """Call `function` until it answers; `what` says in an error what was being done.

        Repeated are broken connections, too many requests (429, after the time that Retry-After names) and failures of
        the server (5xx). Raises UserError for everything else, and at the end.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function()
            except requests.RequestException as error:
                code, reason = _answer(error)
                wait = _retry_after(error) or FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
                if not _passes(code) or attempt == ATTEMPTS or wait > LONGEST_WAIT_SECONDS:
                    raise self._user_error(what, code, reason, wait) from None
                level = logging.INFO if wait > 5 else logging.DEBUG  # streams break every few minutes: no news
                log.log(level, "%s: %s; trying again in %.0f s", what, self.clean(reason), wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def clean(self, text: str) -> str:
        """Return `text` without secrets: the tokens in use, and what signs an address.

        >>> Patience(["abc"]).clean("abc at https://host/file?X-Signature=def, twice")
        '[hidden] at https://host/file?[hidden] twice'
        """
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return redact(re.sub(r"(https?://[^\s?]+\?)\S+", rf"\1{HIDDEN}", text))

    def _user_error(self, what: str, code: int, reason: str, wait: float) -> UserError:
        reason = self.clean(reason)
        if code == 401:
            return Unauthorized(f"{what}: Kaggle does not take this token ({reason}). {TOKEN_HELP}")
        if code in (403, 404):
            return NotFound(
                f"{what}: Kaggle knows nothing there that this account may use ({reason}). OWNER/NAME is the end of an"
                " address on kaggle.com. Check the spelling, and whose token this is."
            )
        if not _passes(code):
            return UserError(f"{what}: Kaggle refuses it ({reason}). Mend what it names, and repeat the command.")
        if wait > LONGEST_WAIT_SECONDS:
            return UserError(f"{what}: {reason}, to be asked again in {wait / 60:.0f} minutes. Repeat it then.")
        return UserError(
            f"{what}: {reason}, {ATTEMPTS} times in a row. Kaggle or the connection to it is down; repeat the command"
            " later, nothing is lost."
        )


def _passes(code: int) -> bool:
    """Tell whether a failure may be over a little later; 0 is a connection that broke."""
    return code in (0, 408, 429) or code >= 500


def _answer(error: requests.RequestException) -> tuple[int, str]:
    """Return the status code of an error, 0 without an answer, and a reason that holds no address and no header."""
    if error.response is None:
        return 0, f"the connection broke ({type(error).__name__})"
    code, message = error.response.status_code, error.response.reason or ""
    try:
        body = error.response.json()  # may hold an error though the status is 200
        code, message = int(body.get("code", code)), str(body.get("message") or message)
    except (ValueError, TypeError, AttributeError, requests.RequestException):
        pass  # a page for people
    if code < 400:
        return 0, f"an answer that cannot be read ({type(error).__name__})"
    return code, f"{code}: {message}" if message else str(code)


def _retry_after(error: requests.RequestException) -> float | None:
    """Return the seconds that the server asks to wait: a number or a date (RFC 9110, section 10.2.3)."""
    value = error.response.headers.get("Retry-After") if error.response is not None else None
    if value is None:
        return None
    try:
        return max(1.0, float(value))
    except ValueError:
        pass
    try:
        return max(1.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
