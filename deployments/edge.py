"""What holds for every HTTP request, whatever its route: plain paths, CORS, bodies of a bounded size, errors
in OpenAI's form.

Knows HTTP and FastAPI; nothing of what requests mean.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import RequestError

_METHODS = ("GET", "HEAD", "POST")
_SHOWN_HEADERS = ("X-Request-Id",)  # to the scripts of other origins


class Api(FastAPI):
    """An application whose edge is outside everything: its own errors, too, can be read by browsers."""

    def __init__(self, title: str, cors_origins: Sequence[str]) -> None:
        super().__init__(title=title)
        self._cors_origins = cors_origins
        self.add_exception_handler(HTTPException, _no_such_route)
        self.add_exception_handler(Exception, _internal_error)

    def get_route(self, path: str, endpoint: Callable[..., Awaitable[Response]]) -> None:
        """A route for GET and HEAD; the server leaves out what HEAD must not have."""
        self.add_api_route(path, endpoint, methods=["GET"])
        self.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    def build_middleware_stack(self) -> ASGIApp:
        app = _PlainPaths(super().build_middleware_stack())
        if not self._cors_origins:
            return app
        return CORSMiddleware(
            app, self._cors_origins, _METHODS, allow_headers=["*"], expose_headers=_SHOWN_HEADERS
        )


class _PlainPaths:
    """Passes `//v1//models/` on as `/v1/models`, as clients mean it that join URLs carelessly."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": plain_path(scope["path"])}
        await self._app(scope, receive, send)


def plain_path(path: str) -> str:
    """The path without empty segments."""
    return re.sub("//+", "/", path).rstrip("/") or "/"


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; of one that is too long no more than that is read.

    Raises `RequestError`.
    """
    announced = request.headers.get("content-length", "")
    body = bytearray()
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as error:
        raise RequestError("the request broke off before its end") from error
    return bytes(body)


def _too_large(max_bytes: int) -> RequestError:
    reason = f"the request body is larger than {max_bytes} bytes; shorten the prompt"
    return RequestError(reason, status=413, code="request_too_large")


def refusal(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error.body(), error.status, headers)


async def _no_such_route(_: Request, error: Any) -> Response:
    """Unknown paths and methods, in the form clients expect."""
    reason = f"{error.detail}; see /docs for what there is"
    return refusal(RequestError(reason, status=error.status_code), error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    """Our own bugs, in the form clients expect; Serve logs the traceback."""
    return refusal(RequestError(f"internal error: {type(error).__name__}", status=500))
