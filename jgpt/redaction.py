"""Keep secrets out of everything that people read: the terminal, the log, status.json, samples.txt, the report.

Beside the data path. What a program reads back is never changed here: `config/check.py` refuses a config with a secret.
"""

import html
import json
import os
import re
import shlex
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

HIDDEN = "[hidden]"
# The names of environment variables that hold secrets, such as HF_TOKEN, PGPASSWORD, SMTP_PASS; not TOKENIZER.
SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|_PWD|CREDENTIAL|KEY|AUTH|COOKIE)S?(?![A-Z])", re.IGNORECASE
)
# Where libraries keep the user's credentials, beside the files that secret variables name.
SECRET_FILES = ("~/.kaggle/kaggle.json", "~/.kaggle/access_token", "~/.netrc")
SHORTEST = 8  # characters
LEAST_CHANGES = 4  # in a word, between letters, digits and signs: "Qwen2" has 1, a key of 32 hex digits about 15
LONG_WORD = 20  # characters: one change less is enough in such a word
SIGNS = re.compile(r"[\"\\<>{}\[\]^$*`]")  # no name has them: one alone counts as LEAST_CHANGES
MOST_BYTES = 1 << 16  # of a file of credentials
UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

# Secrets by their form, wherever they came from.
KNOWN_FORMS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"  # GitHub, GitLab
    r"|\bKGAT_\w{16,}|\bwandb_v\d_\w{20,}"  # Kaggle, Weights & Biases
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{35}"  # Amazon, Google
    r"|\bsk-(?:(?:ant|proj|svcacct|or)-[\w-]{20,}|[A-Za-z0-9]{20,})|\bxox[abeprs]-[\w-]{10,}"  # OpenAI, Slack
    r"|\bnpm_[A-Za-z0-9]{36}|\bpypi-[\w-]{50,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*"  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=Bearer )[\w.~+/-]{8,}=*|(?<=Basic )[\w+/]{8,}=*"  # an Authorization header
    r"|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)",  # a password in an address
    re.DOTALL,
)
# A value behind a name that says what it is, as in "WANDB_API_KEY=..."; hidden where it looks random.
NAMED = re.compile(r"((?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY)[\"']?\s*[=:]\s*[\"']?)([^\s\"'<>,;&]{8,})", re.I)


def redact(text: str) -> str:
    """Replace every secret in a text: those in this process's environment and files, and those of a known form.

    A secret is also found where it was escaped, for JSON, HTML, a shell, an address, or as Python shows a string.

    >>> redact("GET https://me:my-password@host/path: Authorization: Bearer abcdefgh12345678")
    'GET https://[hidden]@host/path: Authorization: Bearer [hidden]'
    """
    return redactor()(text)


def redactor() -> Callable[[str], str]:
    """Return `redact` for many texts: it looks once, now, for the secrets in the environment and in files."""
    spelled = {spelling for secret, _ in _secrets() for spelling in _spellings(secret)}
    secrets = sorted(spelled, key=len, reverse=True)  # one may be a part of another

    def redact_with_them(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        text = NAMED.sub(lambda found: found[1] + (HIDDEN if looks_random(found[2]) else found[2]), text)
        return KNOWN_FORMS.sub(HIDDEN, text)

    return redact_with_them


def redact_values(value: Any) -> Any:
    """Redact every string in a value that will become JSON, before anything is escaped."""
    return _redact_values(value, redactor())


def _redact_values(value: Any, redact_text: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: _redact_values(item, redact_text) for key, item in value.items()}
    return [_redact_values(item, redact_text) for item in value] if isinstance(value, list | tuple) else value


def find_secret(text: str) -> str:
    """Say which secret is in a text, without its value; "" for none."""
    for secret, source in _secrets():
        if any(spelling in text for spelling in _spellings(secret)):
            return f"the secret in {source}"
    return "" if redact(text) == text else "what has the form of a secret"


def looks_random(value: str) -> bool:
    """Tell whether a value is like a key or a good password, and unlike a word, a number, a path or a model's name.

    >>> [looks_random(value) for value in ("checkpoint", "20240101", "HuggingFaceTB/SmolLM2-135M-Instruct")]
    [False, False, False]
    >>> [looks_random(value) for value in ("0f8e7d6c5b4a39281706f5e4d3c2b1a0", "tr0ub4dor&3", 'pass"word')]
    [True, True, True]
    """
    if len(value) < SHORTEST:
        return False
    words = [word for word in re.split(r"[\s/_.,:;=&?+#%~|-]+", value) if word]
    if SIGNS.search(value) or UUID.fullmatch(value) or sum(map(_changes, words)) >= LEAST_CHANGES + len(words) // 2:
        return True
    least = {word: LEAST_CHANGES - (len(word) >= LONG_WORD) for word in words if len(word) >= SHORTEST}
    return any(_changes(word) >= changes for word, changes in least.items())


def _changes(word: str) -> int:
    """Count the changes between letters, digits and signs, and the capitals behind only one small letter."""
    between = len(re.findall(r"[^\W\d]+|\d+|\W+", word)) - 1
    return between + len(re.findall(r"(?<![a-z])(?:[a-z]|[A-Z][a-z])(?=[A-Z])", word))


def _spellings(secret: str) -> set[str]:
    """Return how a secret may stand in a text: as it is, or escaped."""
    plain = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        ascii(secret)[1:-1],
        shlex.quote(secret),
        urllib.parse.quote(secret, errors="replace"),
        urllib.parse.quote(secret, safe="", errors="replace"),
        urllib.parse.quote_plus(secret, errors="replace"),
    }
    as_html = {html.escape(spelling) for spelling in plain} | {html.escape(spelling, quote=False) for spelling in plain}
    # Jinja's escapes of quotes are decimal.
    return plain | as_html | {text.replace("&quot;", "&#34;").replace("&#x27;", "&#39;") for text in as_html}


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield each secret and where it is: in an environment variable, or in a file that these or libraries name."""
    files = [Path(name).expanduser() for name in SECRET_FILES]
    files.append(Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token")
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST:
            files.append(Path(value))
            if looks_random(value) and not _exists(Path(value)):
                yield value, f"the environment variable {name}"
    for file in files:
        with suppress(OSError, ValueError):
            if file.is_file():  # a pipe would be emptied
                with file.open("rb") as opened:
                    text = opened.read(MOST_BYTES).decode("utf-8")
                yield from ((word, f"the file {file}") for word in _in_file(text) if looks_random(word))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a token need not be a valid file name
        return False


def _in_file(text: str) -> list[str]:
    """Return the secrets in a file of credentials: the values of JSON, the passwords of a .netrc, or the whole text."""
    try:
        return [value for key, value in json.loads(text).items() if key != "username" and isinstance(value, str)]
    except (ValueError, AttributeError, RecursionError):  # not JSON, or not an object
        return re.findall(r"password\s+(\S+)", text) or [text.strip()]
