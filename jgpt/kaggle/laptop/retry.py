"""Repeat a call to Kaggle that fails for a short time; if it still fails, raise one clear message without secrets.

Beside the data path: `client.py` makes every call through here. Needs requests, which comes with the `kaggle` package.
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from jgpt.errors import UserError
from jgpt.redaction import HIDDEN, redact

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 2.0  # doubled each time: 2, 4, 8, 16, 32, a minute in all
LONGEST_WAIT_SECONDS = 900.0  # when Kaggle asks for more, the user decides

TOKEN_HELP = (
    "Get one at https://www.kaggle.com/settings/api (Generate New Token) and save it in ~/.kaggle/access_token, set"
    " KAGGLE_API_TOKEN, or run `kaggle auth login` in a terminal."
)

log = logging.getLogger("jgpt")
T = TypeVar("T")


class NotFound(UserError):
    """Kaggle has no such kernel, version or file, or this account may not read it: Kaggle answers 403 to both."""


class Unauthorized(UserError):
    """Kaggle does not accept the token: it may have expired."""


class Retries:
    """Repeats calls that fail, and hides `secrets` in their errors.

    urllib3's Retry repeats one request. That is not enough here: before a push is repeated, Kaggle is asked whether the
    last attempt arrived, and a download continues where its answer broke off. So Retry only reads Retry-After.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self.secrets = sorted(filter(None, secrets), key=len, reverse=True)

    def call(self, what: str, function: Callable[[], T]) -> T:
        """Call `function`, up to ATTEMPTS times; `what` names the call in an error.

        It is repeated after a broken connection, too many requests (429; after Retry-After) and an error of the server
        (5xx). Raises UserError for everything else, and after the last attempt.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function()
            except requests.RequestException as error:
                code, reason = _answer(error)
                wait = _retry_after(error) or FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
                if not _is_temporary(code) or attempt == ATTEMPTS or wait > LONGEST_WAIT_SECONDS:
                    raise self._user_error(what, code, reason, wait) from None
                level = logging.INFO if wait > 5 else logging.DEBUG  # streams break every few minutes: not worth a line
                log.log(level, "%s: %s; trying again in %.0f s", what, self.clean(reason), wait)
                time.sleep(wait)
        raise AssertionError("the last attempt returned or raised")

    def clean(self, text: str) -> str:
        """Return `text` without secrets: the tokens in use, and the signature of an address.

        >>> Retries(["abc"]).clean("abc at https://host/file?X-Signature=def, twice")
        '[hidden] at https://host/file?[hidden] twice'
        """
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return redact(re.sub(r"(https?://[^\s?]+\?)\S+", rf"\1{HIDDEN}", text))

    def _user_error(self, what: str, code: int, reason: str, wait: float) -> UserError:
        reason = self.clean(reason)
        if code == 401:
            return Unauthorized(f"{what}: Kaggle does not accept this token ({reason}). {TOKEN_HELP}")
        if code in (403, 404):
            return NotFound(
                f"{what}: Kaggle finds nothing there that this account may use ({reason}). OWNER/NAME is the end of an"
                " address on kaggle.com. Check the spelling, and whose token this is."
            )
        if not _is_temporary(code):
            return UserError(f"{what}: Kaggle refuses it ({reason}). Fix what it names, and repeat the command.")
        if wait > LONGEST_WAIT_SECONDS:
            return UserError(f"{what}: {reason}. Kaggle asks to wait: repeat the command in {wait / 60:.0f} minutes.")
        return UserError(
            f"{what}: {reason}, {ATTEMPTS} times in a row. Kaggle or the connection to it is down. Nothing is lost:"
            " repeat the command later."
        )


def _is_temporary(code: int) -> bool:
    """Tell whether the call may work a little later; code 0 is a broken connection."""
    return code in (0, 408, 429) or code >= 500


def _answer(error: requests.RequestException) -> tuple[int, str]:
    """Return an error's status code (0 without an answer) and a reason, which has no address and no header in it."""
    if error.response is None:
        return 0, f"the connection broke ({type(error).__name__})"
    code, message = error.response.status_code, error.response.reason or ""
    try:
        body = error.response.json()  # may hold an error even when the status is 200
        code, message = int(body.get("code", code)), str(body.get("message") or message)
    except (ValueError, TypeError, AttributeError, requests.RequestException):
        pass  # a web page and not JSON
    if code < 400:
        return 0, f"an answer that cannot be read ({type(error).__name__})"
    return code, f"{code}: {message}" if message else str(code)


def _retry_after(error: requests.RequestException) -> float | None:
    """Return the seconds that the server asks to wait, None where it does not say."""
    value = error.response.headers.get("Retry-After") if error.response is not None else None
    try:
        return max(1.0, Retry().parse_retry_after(value)) if value else None
    except InvalidHeader:
        return None
