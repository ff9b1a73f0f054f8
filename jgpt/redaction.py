"""Keep secrets out of everything that is printed or written: every text passes through `redact`.

Beside the data path: the terminal's log, the commands' errors and the JSON files of a run call it.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|_KEY$", re.IGNORECASE)  # of environment variables
# Where libraries keep the user's credentials, beside the files that secret variables name.
SECRET_FILES = ("~/.kaggle/kaggle.json", "~/.kaggle/access_token", "~/.netrc")
SHORTEST = 8  # characters: a shorter value ("true", "1") is not a secret, and replacing it would damage the text
# Secrets by their form, wherever they came from: the Hub's tokens, an Authorization header, a password in an address.
KNOWN_FORMS = re.compile(
    r"\bhf_\w{16,}|(?<=Bearer )[\w.~+/-]{8,}=*|(?<=Basic )[\w+/]{8,}=*|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)


def redact(text: str) -> str:
    """Replace every secret in a text: those in this process's environment and files, and those of a known form.

    >>> redact("GET https://me:my-password@host/path: Authorization: Bearer abcdefgh12345678")
    'GET https://[hidden]@host/path: Authorization: Bearer [hidden]'
    """
    for secret in sorted(set(_secrets()), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, HIDDEN)
    return KNOWN_FORMS.sub(HIDDEN, text)


def _secrets() -> Iterator[str]:
    """Yield the values of secret environment variables, and the secrets in the files that these or libraries name."""
    files = [Path(name).expanduser() for name in SECRET_FILES]
    files.append(Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token")
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST:
            files.append(Path(value))
            if not _exists(Path(value)):
                yield value
    for file in files:
        with suppress(OSError, ValueError):
            yield from (word for word in _in_file(file.read_text(encoding="utf-8")) if len(word) >= SHORTEST)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a token need not be a valid file name
        return False


def _in_file(text: str) -> list[str]:
    """Return the secrets in a file of credentials: the values of JSON, the passwords of a .netrc, or the whole text."""
    try:
        return [value for key, value in json.loads(text).items() if key != "username" and isinstance(value, str)]
    except (ValueError, AttributeError):  # not JSON, or not an object
        return re.findall(r"password\s+(\S+)", text) or [text.strip()]
