"""Errors of the HTTP server, with the status codes and the JSON that clients of OpenAI's API understand."""

from typing import Any

_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}
_LONGEST = 500  # messages may repeat what the client sent


class ApiError(Exception):
    """An error that is told to the client.

    Args:
      status: the status code of HTTP.
      message: what is wrong; of a longer text, the first 500 characters are told.
      param: the option that is wrong.
      code: a name of the error that programs can compare with.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message[:_LONGEST], code
        self.param = None if param is None else param[:_LONGEST]

    def as_json(self) -> dict[str, Any]:
        """The body of the reply."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply: whether a key would help, and when to try again."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
