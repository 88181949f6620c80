"""The edge of HTTP: whatever the path, the method, the origin and the size of a request."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deployments.config import RouterArgs
from deployments.edge import plain_path
from deployments.openai import Json
from tests.serving import COMPLETION, END, PATHS, Server
from tests.test_requests import MODEL, TARGET

ORIGIN = "http://localhost:3000"
GETS = ["/health", "/v1/models", f"/v1/models/{MODEL}", "/docs", "/openapi.json"]


@pytest.mark.parametrize("path", GETS)
async def test_head_answers_as_get_without_a_body(path: str) -> None:
    got, head = [await Server().ask(method, path) for method in ("GET", "HEAD")]
    assert got.status_code == head.status_code == 200
    assert got.content
    assert not head.content
    assert head.headers == got.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_says_whether_a_verifier_is_up(method: str) -> None:
    server = Server()
    up = {"status": "ok", "drafters": ["chat", "math"], "numerics": TARGET.numerics}
    assert (await server.ask("GET", "/health")).json() == up
    server.directory.verifier_is_up = False
    assert (await server.ask(method, "/health")).status_code == 503


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/", "/v1//models", "//v1/models", "//v1//models//", "/v1/models///"]
)
async def test_careless_slashes_lead_to_the_same_answer(path: str) -> None:
    answer = await Server().ask("GET", path)
    assert [card["id"] for card in answer.json()["data"]] == [MODEL]


@pytest.mark.parametrize("path", PATHS)
async def test_careless_slashes_are_no_redirect_for_post(path: str) -> None:
    for careless in (f"{path}/", f"/{path}", path.replace("/", "//")):
        answer = await Server(chr(END)).ask("POST", careless, json=PATHS[path])
        assert (answer.status_code, answer.history) == (200, [])


@pytest.mark.parametrize(
    ("path", "plain"), [("", "/"), ("/", "/"), ("//", "/"), ("/a//b/", "/a/b"), ("/a/b", "/a/b"), ("a/", "a")]
)
def test_a_plain_path_has_no_empty_segments(path: str, plain: str) -> None:
    assert plain_path(path) == plain_path(plain) == plain


@pytest.mark.parametrize("name", ["org/name", "/models/llama", "name"])
async def test_a_model_may_have_slashes_in_its_name(name: str) -> None:
    server = Server(model_name=name)
    for path in (f"/v1/models/{name}", f"/v1/models/{name.replace('/', '%2F')}", f"/v1//models/{name}/"):
        assert (await server.ask("GET", path)).json()["id"] == name
    for other in ("other", "org", f"{name}/more"):
        answer = await server.ask("GET", f"/v1/models/{other}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/", 405), ("POST", "/v1/embeddings", 404), ("PUT", "/v1/models", 405)],
)
async def test_an_unknown_path_or_method_is_an_error_in_openais_form(
    method: str, path: str, status: int
) -> None:
    answer = await Server().ask(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "/docs" in answer.json()["error"]["message"]


async def test_a_wrong_method_is_told_the_right_one() -> None:
    answer = await Server().ask("GET", "/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def preflight(server: Server, origin: str = ORIGIN) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return await server.ask("OPTIONS", "/v1/chat/completions", headers=headers)


async def test_a_browser_may_ask_before_it_asks() -> None:
    answer = await preflight(Server())
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers


async def answers(server: Server, origin: str) -> list[httpx.Response]:
    """One of each kind of answer, errors of every origin among them."""
    asked: list[tuple[str, str, Json]] = [
        ("GET", "/health", {}),
        ("GET", "/nowhere", {}),
        ("PUT", "/health", {}),
        ("POST", "/v1/completions", {"json": COMPLETION}),
        ("POST", "/v1/completions", {"json": COMPLETION | {"stream": True}}),
        ("POST", "/v1/completions", {"json": COMPLETION | {"mirostat": 2}}),
        ("POST", "/v1/completions", {"content": b"x" * 10_000}),
    ]
    return [await server.ask(m, path, headers={"Origin": origin}, **options) for m, path, options in asked]


async def test_scripts_of_any_origin_may_read_every_answer() -> None:
    server = Server(chr(END), max_body_bytes=1000)
    got = await answers(server, ORIGIN)
    assert [answer.status_code for answer in got] == [200, 404, 405, 200, 200, 400, 413]
    assert {answer.headers["access-control-allow-origin"] for answer in got} == {"*"}
    assert {answer.headers["access-control-expose-headers"] for answer in got} == {"X-Request-Id"}


async def test_scripts_may_read_our_own_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(body: bytes, model_name: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("deployments.endpoints.parse_completion", broken)
    answer = await Server().ask("POST", "/v1/completions", headers={"Origin": ORIGIN}, json=COMPLETION)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, "*")
    assert answer.json()["error"] == {
        "message": "internal error: RuntimeError", "type": "server_error", "param": None, "code": None,
    }  # fmt: skip


async def test_only_the_configured_origins_are_let_in() -> None:
    server = Server(chr(END), cors_origins=[ORIGIN, "https://app.example"])
    assert (await preflight(server)).headers["access-control-allow-origin"] == ORIGIN
    assert (await preflight(server, "http://elsewhere")).status_code == 400
    for answer in await answers(server, ORIGIN):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    for answer in await answers(server, "http://elsewhere"):
        assert "access-control-allow-origin" not in answer.headers


async def test_without_origins_there_is_no_cors() -> None:
    server = Server(chr(END), cors_origins=[])
    assert (await preflight(server)).status_code == 405
    for answer in await answers(server, ORIGIN):
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["http://localhost:3000/", "localhost", "http://", "https://a.example/app"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="cors_origins"):
        RouterArgs(cors_origins=[origin])


@pytest.mark.parametrize("origin", ["*", "null", "https://a.example", "tauri://localhost", "http://[::1]:8000"])
def test_an_origin_that_browsers_send_is_taken(origin: str) -> None:
    assert RouterArgs(cors_origins=[origin]).cors_origins == [origin]


def of_size(num_bytes: int, **fields: Any) -> bytes:
    body = json.dumps(COMPLETION | fields).encode()
    return body + b" " * (num_bytes - len(body))


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_just_fits_is_read_and_a_larger_one_refused(path: str) -> None:
    server = Server(chr(END), max_body_bytes=1000)
    assert (await server.ask("POST", "/v1/completions", content=of_size(1000))).status_code == 200
    answer = await server.ask("POST", path, content=of_size(1001))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert "1000 bytes" in answer.json()["error"]["message"]
    assert server.ledger.refused == [answer.json()["error"]["message"]]


async def test_of_a_body_that_is_too_long_no_more_is_read() -> None:
    """Chunked: no header says how long it is."""
    server = Server(max_body_bytes=1000)
    async with server.connection("/v1/completions", *[b"x" * 300] * 100) as connection:
        assert (await connection.sent())["status"] == 413
        assert len(connection.unread) == 96


async def test_a_body_in_pieces_is_put_together() -> None:
    body = of_size(900)
    pieces = [body[i : i + 100] for i in range(0, 900, 100)]
    async with Server(chr(END)).connection("/v1/completions", *pieces) as connection:
        assert (await connection.sent())["status"] == 200


def test_a_context_of_128k_tokens_fits_the_default_body() -> None:
    """Four characters each, all of them escaped."""
    assert len("\\u00e9") * 4 * 131_072 < RouterArgs().max_body_bytes
