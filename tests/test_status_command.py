"""`taps status`: what a terminal shows of a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from cluster.cli import main
from cluster.status import lines

TOLD: dict[str, Any] = {
    "status": "ok",
    "model": "small",
    "numerics": "n1",
    "drafters": ["math", "ngram"],
    "applications": {
        "core": {"status": "RUNNING", "deployments": {"Verifier": {"replicas": {"RUNNING": 2}}}},
    },
    "specialists": [
        {"name": "math", "application": "math", "state": "up"},
        {"name": "code", "application": "code", "state": "refused", "reason": "it drafts for another target"},
    ],
    "router": {
        "since": 0.0,
        "answering": 3,
        "requests": {"stop": 5, "refused": 1},
        "tokens": 120,
        "tokens_per_second": 41.26,
        "drafters": {"math": {"drafted": 10, "accepted": 7}},
        "refusals": [{"at": 0.0, "reason": "the prompt is empty"}],
    },
}


def test_it_shows_what_there_is_and_how_it_fares() -> None:
    text = "\n".join(lines(TOLD))
    assert "answering 3 now, 41.3 tokens/s" in text
    assert "requests: 1 refused, 5 stop" in text
    assert "accepted 7 of 10" in text
    assert "it drafts for another target" in text
    assert "in the router" in text
    assert "Verifier 2 RUNNING" in text
    assert "the prompt is empty" in text


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command_asks_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200, json.dumps(TOLD).encode()) as url:
        assert main(["status", "--url", url]) == 0
    assert f"{url}: ok" in capsys.readouterr().out
    with answering(200, json.dumps(TOLD | {"status": "no verifier is up"}).encode()) as url:
        assert main(["status", "--url", url]) == 1


@pytest.mark.parametrize(("status", "body"), [(500, b"{}"), (200, b"no JSON")])
def test_a_server_that_does_not_answer_is_said(
    status: int, body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(status, body) as url:
        assert main(["status", "--url", url]) == 1
    assert "does not answer" in capsys.readouterr().err
    assert main(["status", "--url", "http://127.0.0.1:1"]) == 1


def test_other_commands_are_what_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "train a specialist" in capsys.readouterr().out
