"""One line of a check, and the report that it stands in.

Beside the data path: `jgpt.check_env` prints it. No other package is imported: it works where one is missing.
"""

import sys
from collections.abc import Mapping
from typing import Literal, NamedTuple

from jgpt.redaction import redact
from jgpt.wording import display_width, json_text, pad

STATES = ("ok", "warn", "FAIL")


class Check(NamedTuple):
    """One line of the report: what was looked at, what was found, and what the user can do when it is not ok.

    "FAIL" means that training cannot work, or not on what the user thinks it works on; "warn" that it can.
    """

    name: str
    state: Literal["ok", "warn", "FAIL"]
    value: str
    fix: str = ""


def report(sections: Mapping[str, list[Check]], as_json: bool) -> int:
    """Print the checks without any secret, and return the exit code."""
    print(redact(to_json(sections) if as_json else to_text(sections)))
    return exit_code(sections)


def to_text(sections: Mapping[str, list[Check]]) -> str:
    """Lay the checks out in columns, one section after the other, with what to do below each that is not ok."""
    width = max(display_width(check.name) for checks in sections.values() for check in checks)
    lines = []
    for title, checks in sections.items():
        lines += [title, *(_line(check, width) for check in checks), ""]
    n_warnings, n_failures = (
        sum(check.state == state for checks in sections.values() for check in checks) for state in STATES[1:]
    )
    verdict = "Training cannot work here yet" if n_failures else "Training can work here"
    return "\n".join([*lines, f"{verdict}: {n_failures} to fix, {n_warnings} to know."])


def to_json(sections: Mapping[str, list[Check]]) -> str:
    """Write the checks as one JSON object: "ok", and a list for each section."""
    lists = {title.lower(): [check._asdict() for check in checks] for title, checks in sections.items()}
    return json_text({"ok": exit_code(sections) == 0, **lists}, sys.stdout.encoding)


def exit_code(sections: Mapping[str, list[Check]]) -> int:
    """Return 2 when a check failed, which the user must fix, else 0."""
    return 2 if any(check.state == "FAIL" for checks in sections.values() for check in checks) else 0


def _line(check: Check, width: int) -> str:
    line = f"  {check.state:4}  {pad(check.name, width)}  {check.value}"
    return line + f"\n{'':{width + 10}}-> {check.fix}" if check.fix else line
