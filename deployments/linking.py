"""A router's side of its sessions: replicas are leased through Serve, and each leased one has one link.

Knows Serve's handles, links and messages; nothing of what sessions ask.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.link import Link
from deployments.messages import Entry, Kind, Message, error_of
from taps.peers import PeerBusy, PeerGone

_CONNECT_DEADLINE_S = _CLOSE_DEADLINE_S = 5.0


class RemoteSession:
    """The caller's side of an open session: one question at a time."""

    def __init__(self, link: _ReplicaLink, number: int, numerics: str) -> None:
        self.numerics = numerics  # of the replica
        self._link = link
        self._number = number
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._answer: asyncio.Future[Message] | None = None  # that is waited for
        self._deadline: asyncio.Timeout | None = None  # of that
        self._timeout_s = 0.0
        self._is_broken = False  # an answer may come that nobody waits for

    async def ask(self, message: Message, timeout_s: float) -> Message:
        """Send one message and wait for its answer, as long as the peer shows that it is at work.

        Raises `PeerGone` when the peer is lost or shows no sign of life for `timeout_s` seconds, and whatever
        error the peer answers with.
        """
        return await self._exchange("ask", message, timeout_s)

    async def open(self, secret: str, hello: Message, timeout_s: float, of: int) -> None:
        """Raises as `ask` does, or what the session cannot be opened for. Args: of: so many of the lease."""
        await self._exchange("open", {"secret": secret, "hello": hello, "of": of}, timeout_s)

    async def _exchange(self, kind: Kind, message: Message, timeout_s: float) -> Message:
        if self._is_broken or self._ended.done():
            raise PeerGone("the peer ended the session")
        self._answer, self._timeout_s = asyncio.get_running_loop().create_future(), timeout_s
        self._link.put(self._number, kind, message)
        self._is_broken = True
        try:
            async with asyncio.timeout(timeout_s) as self._deadline:
                answer = await self._answer
        except TimeoutError as error:
            raise PeerGone(f"no sign of life for {timeout_s:g} s") from error
        finally:
            self._is_broken = not self._answer.done() or self._answer.cancelled()
            self._answer = self._deadline = None
        return answer

    def take(self, kind: Kind, body: Message | None) -> None:
        """An entry of the link for this session."""
        if kind == "ended":
            self.lose(PeerGone("the peer ended the session"))
        elif self._answer is not None and not self._answer.done():
            if kind == "error":
                self._answer.set_exception(error_of(body or {}))
            else:
                self._answer.set_result(body or {})

    def lose(self, error: PeerGone) -> None:
        """Nothing more comes from the peer."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        if not self._ended.done():
            self._ended.set_result(None)

    def hear(self) -> None:
        """The peer is at work: it is given as long again."""
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._timeout_s)

    async def close(self) -> None:
        """Say goodbye, and wait until the far side's state is freed, which ends the lease."""
        if not self._ended.done():
            self._link.put(self._number, "end")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_DEADLINE_S):
                    await self._ended


class _ReplicaLink:
    """This process's link to one replica, with the sessions on it."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self.end = Link(self._take)
        self._numbers = count(1)
        self._sessions: dict[int, RemoteSession] = {}
        self.task = asyncio.create_task(self._run())

    @property
    def is_up(self) -> bool:
        return self.end.is_up

    def put(self, number: int, kind: Kind, message: Message | None = None) -> None:
        self.end.put(number, kind, message)

    @asynccontextmanager
    async def session(
        self, granted: Message, hello: Message, timeout_s: float, of: int
    ) -> AsyncIterator[RemoteSession]:
        """The leased session, freed when the block ends."""
        if not self.is_up:
            raise self.end.lost.result()
        number = next(self._numbers)
        session = self._sessions[number] = RemoteSession(self, number, granted.get("numerics", ""))
        try:
            await session.open(granted["secret"], hello, timeout_s, of)
            yield session
        finally:
            await asyncio.shield(session.close())
            self._sessions.pop(number, None)

    async def _run(self) -> None:
        """Connect, and wait for the end; all sessions end with it."""
        host, _, port = self._endpoint.rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_DEADLINE_S):
                await asyncio.get_running_loop().create_connection(lambda: self.end, host, int(port))
            await asyncio.wait({self.end.lost})
        except (OSError, TimeoutError) as error:
            self.end.close(PeerGone(f"the peer is gone: {error or 'it does not answer'}"))
        finally:
            self.end.close()
            for session in self._sessions.values():
                session.lose(self.end.lost.result())

    def _take(self, entry: Entry) -> None:
        number, kind, body = entry
        if kind == "at work":
            for session in self._sessions.values():
                session.hear()
        elif (asking := self._sessions.get(number)) is not None:
            asking.take(kind, body)


class Lease:
    """A replica that Serve keeps for its holder's sessions."""

    def __init__(self, pool: LinkPool, granted: Message, timeout_s: float) -> None:
        self.numerics: str = granted.get("numerics", "")
        self._pool, self._granted, self._timeout_s = pool, granted, timeout_s

    @asynccontextmanager
    async def session(self, hello: Message, of: int = 1) -> AsyncIterator[RemoteSession]:
        """A session on the replica, freed when the block ends. Args: of: so many there are to be of this lease.

        Raises `PeerGone` when the replica is lost, and whatever error it opens with.
        """
        link = self._pool.link(self._granted["endpoint"])
        async with link.session(self._granted, hello, self._timeout_s, of) as session:
            yield session


class LinkPool:
    """One link per replica, made when it is first leased and kept while both live."""

    def __init__(self) -> None:
        self._links: dict[str, _ReplicaLink] = {}

    @asynccontextmanager
    async def lease(self, handle: DeploymentHandle[Any], timeout_s: float) -> AsyncIterator[Lease]:
        """A leased replica, until the block ends.

        Raises `PeerBusy` when no replica has room within `timeout_s` seconds or the deployment's queue is full,
        `PeerGone` when the replica is lost.
        """
        lease: Any = handle.options(stream=True).lease.remote()
        try:
            yield Lease(self, await self._grant(lease, timeout_s), timeout_s)
        finally:
            # Raises the lease's own error when it was never granted; the body has reported that already.
            with contextlib.suppress(RayError, RayServeException):
                lease.cancel()

    @asynccontextmanager
    async def session(
        self, handle: DeploymentHandle[Any], hello: Message, timeout_s: float
    ) -> AsyncIterator[RemoteSession]:
        """A session on a replica leased for it alone; both are freed when the block ends. Raises as both do."""
        async with self.lease(handle, timeout_s) as lease, lease.session(hello) as session:
            yield session

    def link(self, endpoint: str) -> _ReplicaLink:
        """The one there is, or a new one."""
        link = self._links.get(endpoint)
        if link is None or not link.is_up:
            link = self._links[endpoint] = _ReplicaLink(endpoint)
            link.task.add_done_callback(lambda _: self._forget(endpoint, link))
        return link

    def _forget(self, endpoint: str, link: _ReplicaLink) -> None:
        if self._links.get(endpoint) is link:
            del self._links[endpoint]

    async def close(self) -> None:
        """End all links, and with them what is open on them."""
        tasks = [link.task for link in self._links.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _grant(self, lease: Any, timeout_s: float) -> Message:
        try:
            # Not `wait_for`: in Python 3.11 it loses a cancellation that coincides with the result.
            async with asyncio.timeout(timeout_s):
                granted: Message = await anext(lease)
        except TimeoutError as error:
            raise PeerBusy(f"no replica was free within {timeout_s:g} s") from error
        except BackPressureError as error:
            raise PeerBusy("the queue for replicas is full") from error
        except (RayError, RayServeException, StopAsyncIteration) as error:
            raise PeerGone(f"no replica can be leased: {type(error).__name__}") from error
        return granted
