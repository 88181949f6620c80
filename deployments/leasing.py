"""A replica's side of its sessions: leases that Serve counts, and links that carry their messages.

The lease is a streaming Serve call that stays open for its sessions, so autoscaling, queue bounds and draining
work on leases. A session is opened on a link with its lease's secret; the answers of one request have a session
each on one lease. Whichever side goes first, all state of the sessions is freed: a lease ends with the last of
them, they end with it, and the end of a link ends all sessions on it.

Knows Serve's calls, links and messages; nothing of what sessions compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, TypeVar, cast

import ray.util

from deployments.link import Link
from deployments.messages import Entry, Message, error_message, is_expected
from taps.peers import PeerGone

logger = logging.getLogger("ray.serve")
_CONNECT_DEADLINE_S = 10.0
_CLOSE_DEADLINE_S = 5.0
_SIGN_OF_LIFE_S = 1.0  # how often a replica that owes answers says that it is at work

T = TypeVar("T")
Handler = Callable[[Message], Awaitable[Message]]
# Called with a session's first message; the handler it gives answers all further ones, one at a time.
OpenSession = Callable[[Message], AbstractAsyncContextManager[Handler]]


def node_address() -> str:
    """The address other nodes of the cluster reach this one at."""
    return str(cast(Any, ray.util).get_node_ip_address())


class _Lease:
    """Promised sessions: until all of them have ended, or nobody opens the next in time."""

    def __init__(self) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self.left: int | None = None  # that may be opened yet; the first one says how many there are
        self._news = asyncio.Event()  # a session was opened, or ended

    def open(self, session: asyncio.Task[None], of: int) -> bool:
        """Whether the session is one of this lease's."""
        left = of if self.left is None else self.left
        if left < 1:
            return False
        self.left = left - 1
        self.running.add(session)
        self._news.set()
        return True

    def end(self, session: asyncio.Task[None]) -> None:
        """All that the session held is freed."""
        self.running.discard(session)
        self._news.set()

    async def until_over(self) -> None:
        """Until none is left, or none runs and the next is not opened in time."""
        while self.left != 0 or self.running:
            self._news.clear()
            if self.running:
                await self._news.wait()
                continue
            try:
                async with asyncio.timeout(_CONNECT_DEADLINE_S):
                    await self._news.wait()
            except TimeoutError:
                return

    async def until_freed(self) -> None:
        """Until none runs."""
        while self.running:
            self._news.clear()
            await self._news.wait()


class SessionServer:
    """Hands out leases and serves their sessions. `start` it in the replica's `__init__`."""

    def __init__(
        self, open_session: OpenSession, check: Callable[[], None] = lambda: None, numerics: str = ""
    ) -> None:
        """Args: check: raises RuntimeError once the replica can do no more, and no answer will come; numerics:
        what every lease grant says of the replica.
        """
        self.open_session = open_session
        self.check = check
        self._numerics = numerics
        self._leases: dict[str, _Lease] = {}
        self._server: asyncio.Server | None = None
        self._links: set[_ServedLink] = set()
        self._endpoint = ""

    async def start(self, host: str) -> None:
        """Listen on a free port of `host`."""
        self._server = await asyncio.get_running_loop().create_server(self._accept, host, 0)
        self._endpoint = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening; links and their sessions are ended."""
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.end.close()
        await asyncio.gather(*(link.task for link in self._links), return_exceptions=True)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    async def lease(self) -> AsyncIterator[Message]:
        """A streaming Serve method: yields endpoint and secret, then lasts as long as the sessions."""
        secret = secrets.token_urlsafe(24)
        lease = self._leases[secret] = _Lease()
        try:
            yield {"endpoint": self._endpoint, "secret": secret, "numerics": self._numerics}
            await lease.until_over()
        finally:
            del self._leases[secret]
            for session in lease.running:
                session.cancel()
            # Their state goes before Serve may give the place to another lease.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_DEADLINE_S):
                    await lease.until_freed()

    def take(self, secret: str, session: asyncio.Task[None], of: int) -> _Lease | None:
        """The lease of a session that begins; None where there is none, or all of it are taken."""
        lease = self._leases.get(secret)
        return lease if lease is not None and lease.open(session, of) else None

    def _accept(self) -> Link:
        link = _ServedLink(self)
        self._links.add(link)
        link.task.add_done_callback(lambda _: self._links.discard(link))
        return link.end


class _ServedLink:
    """One router's link: its sessions run as tasks, which end with it."""

    def __init__(self, server: SessionServer) -> None:
        self._server = server
        self._sessions: dict[int, _Served] = {}
        self.end = Link(self._take)
        self.task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        """Until either side ends it, or is gone. All that its sessions held is freed then."""
        showing = asyncio.create_task(self._show_life())
        try:
            await asyncio.wait({self.end.lost})
        finally:
            self.end.close()
            tasks = [showing, *(session.task for session in self._sessions.values())]
            for task in tasks:
                task.cancel()
            # Shielded from the link's own end: what sessions hold is freed whoever waits.
            await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))

    def _take(self, entry: Entry) -> None:
        number, kind, body = entry
        session = self._sessions.get(number)
        if kind == "open" and session is None:
            session = self._sessions[number] = _Served(self._server, self.end, number, body or {})
            session.task.add_done_callback(lambda _: self._sessions.pop(number, None))
        elif kind == "ask" and session is not None:
            session.asked.put_nowait(body or {})
        elif kind == "end" and session is not None:
            session.task.cancel()

    async def _show_life(self) -> None:
        """Say that the replica is at work, as long as it is well and owes answers."""
        while True:
            await asyncio.sleep(_SIGN_OF_LIFE_S)
            owing = [session for session in self._sessions.values() if session.owes]
            try:
                self._server.check()
            except RuntimeError as error:
                for session in owing:
                    session.give_up(error)
            else:
                if owing:
                    self.end.put(0, "at work")


class _Served:
    """One session: a task that opens it and answers its messages one after the other."""

    def __init__(self, server: SessionServer, link: Link, number: int, opening: Message) -> None:
        self.asked: asyncio.Queue[Message] = asyncio.Queue()
        self.owes = True  # an answer
        self._server = server
        self._link = link
        self._number = number
        self.task = asyncio.create_task(self._run(opening))

    def give_up(self, error: Exception) -> None:
        """No answer will come: say why, and end."""
        self._fail(error)
        self.task.cancel()

    async def _run(self, opening: Message) -> None:
        lease = None
        try:
            lease = self._server.take(opening["secret"], self.task, opening["of"])
            if lease is None:
                self._fail(PeerGone("no such lease"))
                return
            async with AsyncExitStack() as stack:
                opening_it = stack.enter_async_context(self._server.open_session(opening["hello"]))
                handle = await self._told(opening_it)
                if handle is None:
                    return
                self._answer("opened", None)
                while True:
                    await self._handle(handle, await self.asked.get())
        finally:
            if lease is not None:
                lease.end(self.task)
            self._link.put(self._number, "ended")

    async def _handle(self, handle: Handler, message: Message) -> None:
        self.owes = True
        if (answer := await self._told(handle(message))) is not None:
            self._answer("answer", answer)

    async def _told(self, work: Awaitable[T]) -> T | None:
        """What the work gives; None where it fails, which the far side is told."""
        try:
            return await work
        # Whatever it is, a bug of a handler too, is that session's answer: its owner must not wait for another
        # one, and the link's other sessions go on.
        except Exception as error:
            self._fail(error)
            return None

    def _answer(self, kind: Any, body: Message | None) -> None:
        self.owes = False
        self._link.put(self._number, kind, body)

    def _fail(self, error: Exception) -> None:
        """One that is no part of the protocol is logged where it happened."""
        if not is_expected(error) and not isinstance(error, PeerGone):
            logger.error("a session failed", exc_info=error)
        self._answer("error", error_message(error))
