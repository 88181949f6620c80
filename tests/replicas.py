"""Replicas without Ray: session servers behind handles that lease as Serve does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import repeat
from typing import Any, cast

from deployments.leasing import Handler, SessionServer
from deployments.messages import Message
from taps.models.cache import CacheFull
from tests.fakes import until

PATIENCE_S = 5.0


class FakeLease:
    """What a streaming Serve call gives, around a server's generator."""

    def __init__(self, server: SessionServer) -> None:
        self._generator = server.lease()
        self.ended: asyncio.Task[None] | None = None

    async def __anext__(self) -> Message:
        return await anext(self._generator)

    async def finish(self) -> None:
        """As Serve does: run the generator to its end."""
        async for _ in self._generator:
            pass

    def cancel(self) -> None:
        self.ended = asyncio.create_task(cast(Any, self._generator).aclose())


class Queued:
    """A lease that is waited for in vain."""

    async def __anext__(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("never reached")

    def cancel(self) -> None:
        pass


class GrantedHandle:
    """A deployment handle whose leases are granted at once, of whatever replica, and never end."""

    def __init__(self, granted: Message) -> None:
        self._granted = granted
        self.lease = self

    def options(self, stream: bool) -> GrantedHandle:
        return self

    def remote(self) -> GrantedHandle:
        return self

    async def __anext__(self) -> Message:
        return self._granted

    def cancel(self) -> None:
        pass


class FakeHandle:
    """A deployment handle that leases its replicas in `turns`, by default the first; without one, none."""

    def __init__(self, *servers: SessionServer) -> None:
        self.servers = list(servers)
        self.leases: list[FakeLease] = []
        self.turns: Iterator[int] = repeat(0)
        self.session_ids: list[str] = []  # that Serve was asked to route by
        self.lease = self

    def options(self, stream: bool = False, session_id: str = "") -> FakeHandle:
        self.session_ids += [session_id] if session_id else []
        return self

    def remote(self) -> FakeLease | Queued:
        if not self.servers:
            return Queued()
        self.leases.append(FakeLease(self.servers[next(self.turns)]))
        return self.leases[-1]


class Replica:
    """A session server whose sessions are answered by what `make` makes of their first message."""

    def __init__(self, make: Callable[[Message], Handler]) -> None:
        self._make = make
        self.open = 0
        self.opened = asyncio.Event()
        self.server = SessionServer(self._open_session)
        self.handle: Any = FakeHandle(self.server)

    @asynccontextmanager
    async def _open_session(self, hello: Message) -> AsyncIterator[Handler]:
        if hello.get("refuse"):
            raise CacheFull("no slot")
        self.open += 1
        self.opened.set()
        try:
            yield self._make(hello)
        finally:
            self.open -= 1

    async def until_free(self) -> None:
        await until(lambda: not self.open and not self.server.num_leases)


@asynccontextmanager
async def running(*makes: Callable[[Message], Handler]) -> AsyncIterator[list[Replica]]:
    """Replicas, listening until the block ends."""
    replicas = [Replica(make) for make in makes]
    for replica in replicas:
        await replica.server.start("127.0.0.1")
    try:
        yield replicas
    finally:
        for replica in replicas:
            await replica.server.stop()
