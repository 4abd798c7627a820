"""Errors of the API, in the form that OpenAI's clients expect."""

from __future__ import annotations


class APIError(Exception):
    """A reply ``{"error": {"message", "type", "param", "code"}}`` with an HTTP status.

    ``param`` names the parameter at fault. ``retry_after`` is in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    @property
    def body(self) -> dict:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def type(self) -> str:
        if self.status == 401:
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def internal() -> APIError:
    return APIError(500, "an internal error: the server's log has the details", code="internal_error")
