"""What Kaggle answers, in our terms: a push, the state of a session, the quota, a log.

Beside the data path: `client.py` makes these, and the verbs show them. Nothing here needs the `kaggle` package.
"""

import json
from dataclasses import dataclass
from datetime import datetime

ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")  # the last also when Kaggle ends a session at its 12 hours


@dataclass(frozen=True)
class Pushed:
    """The version that a push made."""

    version: int
    url: str
    notes: list[str]  # what the package printed during the push


@dataclass(frozen=True)
class Status:
    """The state of a session."""

    state: str  # Kaggle's word: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED, CANCEL_ACKNOWLEDGED, NEW_SCRIPT
    message: str  # why it failed

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Quota:
    """The hours of this week that Kaggle lends its GPUs, or its TPUs."""

    used: float
    allowed: float
    refresh: datetime | None  # UTC

    @property
    def left(self) -> float:
        return max(0.0, self.allowed - self.used)

    def __str__(self) -> str:
        refresh = f"; filled up again on {self.refresh:%A %Y-%m-%d %H:%M} UTC" if self.refresh else ""
        return f"{self.used:.1f} of this week's {self.allowed:.0f} used, {self.left:.1f} left{refresh}"


def plain_log(text: str) -> str:
    r"""Return a log as it was printed, from Kaggle's JSON of it.

    >>> plain_log('[{"stream_name": "stdout", "time": 1.5, "data": "step 1\\n"}, {"data": "step 2\\n"}]')
    'step 1\nstep 2\n'
    """
    try:
        pieces = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(pieces, list):
        return text
    return "".join(str(piece.get("data") or "") for piece in pieces if isinstance(piece, dict))
