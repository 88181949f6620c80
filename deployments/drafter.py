"""The drafter deployment: one specialist, an application of its own, for many leased sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from ray import serve

from deployments.config import SpecialistArgs
from deployments.descriptions import SpecialistDescription
from deployments.leasing import Handler, SessionServer, node_address
from deployments.messages import Message
from deployments.priority import take_a_place
from deployments.sessions import answering_drafter
from taps.engine.scheduling import MAX_SESSIONS


@serve.deployment(max_ongoing_requests=MAX_SESSIONS, ray_actor_options={"num_cpus": 0.2})
class Drafter:
    """Serves `taps.drafting.batched.BatchedDrafter` over sessions."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: SpecialistArgs
    ) -> None:
        take_a_place()
        from deployments.loading import load_drafter  # heavy: not for those who only bind the class

        self._drafter, self._description = load_drafter(args)
        self._description = replace(self._description, draft_seconds=await self._drafter.profile())
        self._server = SessionServer(self._open_session, self._drafter.check)
        await self._server.start(node_address())

    def describe(self) -> SpecialistDescription:
        """What the router must know of it."""
        return self._description

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises several times in a row."""
        self._drafter.check()

    async def lease(self) -> AsyncIterator[Message]:
        async for grant in self._server.lease():
            yield grant

    @asynccontextmanager
    async def _open_session(self, hello: Message) -> AsyncIterator[Handler]:
        async with self._drafter.session() as session:
            yield answering_drafter(session)
