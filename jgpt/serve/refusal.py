"""What a client is told when its request is refused: a status and an error in OpenAI's form.

Beside the data path: every file of this room raises it, and `app.py` sends it.
"""

from typing import Any


class Refusal(Exception):
    """A request that is not answered. The message says what was given, what is allowed, and what to do."""

    def __init__(
        self, status: int, message: str, code: str = "", param: str = "", headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients read it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param or None, "code": self.code or None}}
