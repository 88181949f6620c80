"""What is answered to a request that cannot be served, in the OpenAI HTTP format."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that cannot be served; becomes an OpenAI error body."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
