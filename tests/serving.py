"""A server's endpoints on scripted generators: what tests of HTTP ask, without Ray, targets or sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message, Scope

from deployments.config import RouterArgs
from deployments.edge import Api
from deployments.endpoints import Endpoints
from deployments.openai import Json
from deployments.record import RequestRecord
from deployments.requests import Generation, RequestReader
from deployments.status import Recent
from deployments.verifiers import Leasing
from taps.decoding.policy import Step
from tests.fakes import make_verdict, until
from tests.test_requests import MODEL, TARGET, CharacterTokenizer

END = CharacterTokenizer.eos_token_id
CHAT: Json = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
COMPLETION: Json = {"model": MODEL, "prompt": "hello", "temperature": 0}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
PATIENCE_S = 10.0

# What a generation does in turn: text it decides, an error it raises, an event it waits for.
Script = tuple[str | Exception | asyncio.Event, ...]


class ScriptedGenerator:
    """Implements `Generator`; counts what is open."""

    def __init__(self, script: Script) -> None:
        self.jobs: list[Generation] = []
        self.num_open = self.num_leased = 0
        self._script = script

    @asynccontextmanager
    async def verifier(self, jobs: Sequence[Generation], leasing: Leasing) -> AsyncIterator[None]:
        with leasing():
            self.num_leased += 1
        try:
            yield
        finally:
            self.num_leased -= 1

    async def steps(
        self, job: Generation, specialists: Mapping[str, Any], verifier: None
    ) -> AsyncIterator[Step]:
        self.jobs.append(job)
        self.num_open += 1
        prefill = True
        try:
            for turn in self._script:
                if isinstance(turn, Exception):
                    raise turn
                if isinstance(turn, asyncio.Event):
                    await turn.wait()
                else:
                    yield Step(make_verdict([ord(c) for c in turn]), prefill, 0.0, 1.0)
                    prefill = False
        finally:
            self.num_open -= 1


class Ledger:
    """Implements `Observer`."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.outcomes: list[str] = []
        self.num_tokens = 0
        self.recent = Recent()

    def observe_begin(self, record: RequestRecord) -> None:
        self.recent.begin()

    def leasing(self, record: RequestRecord) -> AbstractContextManager[None]:
        return nullcontext()

    def observe_step(self, step: Step, record: RequestRecord) -> None:
        self.num_tokens += record.step_tokens

    def observe_refusal(self, reason: str) -> None:
        self.refused.append(reason)

    def observe_end(self, record: RequestRecord, outcome: str) -> None:
        self.outcomes.append(outcome)


class Server:
    """Endpoints in front of a scripted generator."""

    def __init__(self, *script: str | Exception | asyncio.Event, **args: Any) -> None:
        """Args: script: what each generation does; args: the router's."""
        self.generator = ScriptedGenerator(script)
        self.ledger = Ledger()
        self.directory = SimpleNamespace(
            specialists={"chat": None, "math": None}, away=frozenset(), verifier_is_up=True,
            told=lambda: {"applications": {}, "specialists": []},
        )  # fmt: skip
        arguments = RouterArgs(**args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deployments.requests.AutoTokenizer", CharacterTokenizer)
            patch.setattr("deployments.requests.end_tokens", lambda *_: frozenset({END}))
            reader = RequestReader("nowhere", TARGET, arguments)
        parts = reader, cast(Any, self.generator), cast(Any, self.directory), cast(Any, self.ledger)
        self.api: Api = Endpoints(arguments, TARGET, *parts).api()

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            return await client.request(method, f"http://server{path}", **options)

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        return await self.ask("POST", path, json=PATHS[path] | fields)

    @asynccontextmanager
    async def connection(self, path: str, *body: bytes) -> AsyncIterator[Connection]:
        connection = Connection(self.api, path, body)
        try:
            yield connection
        finally:
            connection.task.cancel()
            with suppress(asyncio.CancelledError):
                await connection.task

    async def until_free(self) -> None:
        await until(lambda: not self.generator.num_open and not self.generator.num_leased)


class Connection:
    """One POST request as a server of HTTP passes it on, message by message."""

    def __init__(self, api: Api, path: str, body: tuple[bytes, ...]) -> None:
        self.unread = list(body)
        self.gone = asyncio.Event()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        scope: Scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": b"", "headers": [], "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1", "scheme": "http", "client": None, "server": ("server", 80),
        }  # fmt: skip
        self.task = asyncio.create_task(api(scope, self._receive, self._sent.put))

    async def _receive(self) -> Message:
        if self.unread:
            return {"type": "http.request", "body": self.unread.pop(0), "more_body": bool(self.unread)}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def sent(self) -> Message:
        """What is sent next."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._sent.get()
