"""The router deployment with a fake Serve: it serves what its verifier says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from deployments.config import RouterArgs, TargetArgs
from deployments.descriptions import TargetDescription
from deployments.router import Router
from tests.serving import ScriptedGenerator
from tests.test_requests import MODEL, CharacterTokenizer

TARGET = TargetDescription(vocab_size=1000, fingerprint="f", max_tokens=100)


class VerifierHandle:
    """A handle whose replica is there once `up` is set."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.describe = self

    async def remote(self) -> TargetDescription:
        await self.up.wait()
        return TARGET


class FakeDirectory:
    def __init__(
        self, target: TargetDescription, core: str, interval_s: float, expected: Sequence[str]
    ) -> None:
        self.about = target, core, interval_s, expected
        self.specialists = {"math": None}
        self.away: frozenset[str] = frozenset()
        self.verifier_is_up = False

    def start(self) -> None:
        self.verifier_is_up = True


@pytest.fixture(autouse=True)
def without_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deployments.router.serve.get_replica_context", lambda: SimpleNamespace(app_name="core")
    )
    monkeypatch.setattr("deployments.router.Directory", FakeDirectory)
    monkeypatch.setattr("deployments.router.take_a_place", lambda: None)
    monkeypatch.setattr("deployments.router.Generator", lambda *_: ScriptedGenerator(("Hi", chr(2))))
    monkeypatch.setattr("deployments.requests.AutoTokenizer", CharacterTokenizer)


async def router_of(handle: VerifierHandle, args: RouterArgs) -> Any:
    """As Serve makes it, without what Serve adds to the class."""
    deployment: Any = Router
    plain = deployment.func_or_class.__bases__[0]
    router = plain.__new__(plain)
    await router.__init__(cast(Any, handle), TargetArgs(), args)
    return router


async def ask(router: Any, method: str, path: str, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(router.__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport) as client:
        return await client.request(method, f"http://server{path}", **options)


async def test_the_router_is_up_once_its_verifier_says_what_it_serves() -> None:
    handle = VerifierHandle()
    starting = asyncio.create_task(router_of(handle, RouterArgs()))
    await asyncio.sleep(0)
    assert not starting.done()
    handle.up.set()
    router = await starting
    assert (await ask(router, "GET", "/health")).json() == {
        "status": "ok",
        "drafters": ["math"],
        "numerics": TARGET.numerics,
    }
    (card,) = (await ask(router, "GET", "/v1/models")).json()["data"]
    assert (card["id"], card["max_model_len"]) == (MODEL, TARGET.max_tokens)


async def test_the_router_gives_up_on_a_verifier_that_never_comes() -> None:
    with pytest.raises(TimeoutError):
        await router_of(VerifierHandle(), RouterArgs(start_deadline_s=0.01))


async def test_the_router_answers_with_the_specialists_of_its_directory() -> None:
    handle = VerifierHandle()
    handle.up.set()
    router = await router_of(handle, RouterArgs(drafters=["math", "chat"], discovery_interval_s=3.0))
    assert router._directory.about == (TARGET, "core", 3.0, ["math", "chat"])
    answer = await ask(
        router, "POST", "/v1/completions", json={"model": MODEL, "prompt": "hello", "max_tokens": 2}
    )
    assert answer.json()["choices"][0]["text"] == "Hi"
    assert list(answer.json()["metrics"]["speculative_decoding"]["accepted_by_drafter"]) == ["math"]
