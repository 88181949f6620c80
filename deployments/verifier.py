"""The verifier deployment: one replica runs the target for many leased sessions."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from ray import serve

from deployments.config import TargetArgs, VerifierArgs
from deployments.descriptions import TargetDescription
from deployments.leasing import Handler, SessionServer, node_address
from deployments.messages import Message
from deployments.priority import take_a_place
from deployments.sessions import answering_verifier
from taps.engine.scheduling import MAX_SESSIONS

logger = logging.getLogger("ray.serve")


@serve.deployment(max_ongoing_requests=MAX_SESSIONS, ray_actor_options={"num_cpus": 0.6})
class Verifier:
    """Serves `taps.engine.verifier.BatchedVerifier` over sessions."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, target: TargetArgs, args: VerifierArgs
    ) -> None:
        take_a_place()
        # Heavy: not for those who only bind the class.
        from deployments.loading import load_verifier
        from deployments.metrics import Capacity

        self._verifier, self._description = load_verifier(target, args)
        await self._verifier.warm_up()
        served = self._verifier.target
        profiled = served.costs.table() if served.costs.is_known else {}
        self._description = replace(self._description, numerics=served.numerics, pass_seconds=profiled)
        logger.info("numerics: %s", served.numerics)
        if served.inexact_because is not None:
            logger.warning("text is not exact to the bit here: %s", served.inexact_because)
        self._capacity = Capacity()
        self._server = SessionServer(self._open_session, self._verifier.check, served.numerics)
        await self._server.start(node_address())

    def describe(self) -> TargetDescription:
        """What the router and its drafters must know of the target."""
        return self._description

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises several times in a row."""
        cache = self._verifier.target.cache
        self._capacity.observe(cache.num_pages, cache.num_available, self._server.num_leases)
        self._verifier.check()

    async def lease(self) -> AsyncIterator[Message]:
        async for grant in self._server.lease():
            yield grant

    @asynccontextmanager
    async def _open_session(self, hello: Message) -> AsyncIterator[Handler]:
        async with self._verifier.session(hello.get("beside", False)) as session:
            self._capacity.open()
            yield answering_verifier(session)
