"""The page at `/`: it is there, whole, and asks nobody else for anything."""

from __future__ import annotations

import re

import pytest

from tests.serving import Server


async def test_the_page_and_all_it_names_are_served() -> None:
    server = Server()
    page = await server.ask("GET", "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"page.css", "page.js"} <= {*named}
    for name in named:
        if not name.startswith("data:"):
            answer = await server.ask("GET", f"/{name}")
            assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    assert (await server.ask("HEAD", "/")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js"])
async def test_nothing_of_it_comes_from_elsewhere(path: str) -> None:
    answer = await Server().ask("GET", path)
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", answer.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
