"""The verifier of one request: a lease that its answers share, and another one where that is lost.

Knows handles, leases and numerics; nothing of decoding.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

from ray.serve.handle import DeploymentHandle

from deployments.linking import Lease, LinkPool
from deployments.sessions import RemoteVerifierSession
from taps.peers import PeerGone

_LEASES = 4  # that are tried for a verifier of the same numerics
Leasing: TypeAlias = Callable[[], AbstractContextManager[None]]


@dataclass
class _Held:
    """A lease, and what is open on it."""

    lease: Lease
    ending: AsyncExitStack
    num_opened: int = 0
    num_open: int = 0
    is_lost: bool = False


class RequestVerifier:
    """Where a request's sessions are; `close` it."""

    def __init__(
        self, pool: LinkPool, handle: DeploymentHandle[Any], conversation: str, num_sessions: int,
        lease_deadline_s: float, verify_deadline_s: float, leasing: Leasing = nullcontext,
    ) -> None:  # fmt: skip
        """Args: conversation: names those that begin alike, where that is known; num_sessions: its answers;
        leasing: entered while it waits for a lease.
        """
        self._pool, self._handle = pool, handle
        self._waiting = leasing
        self._conversation = conversation
        self._num_sessions = num_sessions
        self._lease_deadline_s, self._verify_deadline_s = lease_deadline_s, verify_deadline_s
        self._numerics: str | None = None  # of the verifier that the request began on
        self._leasing = asyncio.Lock()
        self._held: list[_Held] = []  # the newest last

    @asynccontextmanager
    async def session(self) -> AsyncIterator[RemoteVerifierSession]:
        """One answer's session, on the lease they share.

        Raises `PeerBusy` when no verifier has room, `PeerGone` when it is lost: the next is on another one.
        """
        held = await self._hold()
        try:
            # The lease has a place on its replica; what is beside its first session is counted in pages alone.
            hello, held.num_opened = {"beside": held.num_opened > 0}, held.num_opened + 1
            async with held.lease.session(hello, self._num_sessions) as session:
                yield RemoteVerifierSession(session, self._verify_deadline_s)
        except PeerGone:
            held.is_lost = True
            raise
        finally:
            held.num_open -= 1
            if held.is_lost and not held.num_open:
                await held.ending.aclose()

    async def close(self) -> None:
        """End all leases."""
        for held in self._held:
            await held.ending.aclose()

    async def _hold(self) -> _Held:
        async with self._leasing:
            if not self._held or self._held[-1].is_lost:
                ending = AsyncExitStack()
                with self._waiting():
                    lease = await ending.enter_async_context(self._alike())
                self._numerics = self._numerics or lease.numerics
                self._held.append(_Held(lease, ending))
            held = self._held[-1]
            held.num_open += 1
            return held

    @asynccontextmanager
    async def _alike(self) -> AsyncIterator[Lease]:
        """A verifier that goes on with the same bits, if a few leases find one; else the last of them.

        Where Serve routes by sessions, the first asked is the one that a conversation always goes to.
        """
        for number in range(_LEASES):
            handle = self._handle
            if self._conversation:
                handle = handle.options(session_id=f"{self._conversation}/{number}")
            async with self._pool.lease(handle, self._lease_deadline_s) as lease:
                if number == _LEASES - 1 or self._numerics in (None, lease.numerics):
                    yield lease
                    return
