"""Generations on leased replicas: verifier and drafters in, decoded steps out, every lease ended.

Knows handles and leases; nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager, nullcontext
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.config import RouterArgs
from deployments.directory import Specialist
from deployments.linking import LinkPool
from deployments.requests import Generation
from deployments.sessions import RemoteVerifierSession, drafter_session
from deployments.verifiers import Leasing, RequestVerifier
from taps.adaptive import ADAPTIVE
from taps.adaptive.planning import Planner
from taps.adaptive.policy import Adaptive, Fleet
from taps.composing import STRATEGIES
from taps.context import Context
from taps.decoding.loop import decode
from taps.decoding.panel import Panel
from taps.decoding.policy import Fixed, Policy, Step
from taps.drafting.ngram import NgramSession
from taps.engine.costs import StepCosts
from taps.peers import PeerGone

_REJOIN_DELAY_S = 0.5
logger = logging.getLogger("ray.serve")


class Generator:
    """Decodes generations on whatever replicas Serve leases."""

    def __init__(
        self, verifier: DeploymentHandle[Any], args: RouterArgs, pass_seconds: Mapping[int, float] | None = None
    ) -> None:
        """Args: pass_seconds: of a verify pass by its rows, as the verifier profiled it."""
        self._verifier = verifier
        self._args = args
        self._pool = LinkPool()
        self._fleet = Fleet(Planner(StepCosts(pass_seconds) if pass_seconds else None))

    @asynccontextmanager
    async def verifier(
        self, jobs: Sequence[Generation], leasing: Leasing = nullcontext
    ) -> AsyncIterator[RequestVerifier]:
        """Where one request's answers are decided; leased when the first of them asks for it.

        Args: leasing: entered while it waits for the lease.
        """
        waits = self._args.lease_deadline_s, self._args.verify_deadline_s
        shared = RequestVerifier(self._pool, self._verifier, jobs[0].conversation, len(jobs), *waits, leasing)
        try:
            yield shared
        finally:
            await shared.close()

    async def steps(
        self, job: Generation, specialists: dict[str, Specialist], shared: RequestVerifier
    ) -> AsyncGenerator[Step, None]:
        """The steps of one answer, until closed. Drafters join when their leases are there."""
        chosen = [(index, specialists[name]) for index, name in enumerate(job.drafters) if name in specialists]
        context = Context(job.state, self._args.feature_window if chosen else 0)
        panel = Panel(
            self._at_hand(job, specialists), self._args.propose_deadline_s, self._args.propose_patience
        )
        keepers: list[asyncio.Task[None]] = []

        @asynccontextmanager
        async def open_verifier() -> AsyncIterator[RemoteVerifierSession]:
            async with shared.session() as verifier:
                # An answer that still waits for its verifier holds no drafter.
                if not keepers:
                    likely = policy.likely([specialist.name for _, specialist in chosen])
                    for index, specialist in chosen:
                        keeping = self._keep_on(panel, specialist, index, specialist.name in likely)
                        keepers.append(asyncio.create_task(keeping))
                yield verifier

        for _, specialist in chosen:
            self._fleet.planner.meet(specialist.name, specialist.draft_seconds)
        try:
            with self._policy(job) as policy:
                async with aclosing(decode(context, open_verifier, panel, policy)) as steps:
                    async for step in steps:
                        yield step
        finally:
            for keeper in keepers:
                keeper.cancel()
            await panel.close()
            for ended in await asyncio.gather(*keepers, return_exceptions=True):
                if isinstance(ended, Exception):
                    logger.error("a specialist was left out for good", exc_info=ended)

    @contextmanager
    def _policy(self, job: Generation) -> Iterator[Policy]:
        if job.strategy != ADAPTIVE:
            yield Fixed(STRATEGIES[job.strategy], job.ask)
            return
        with closing(Adaptive(self._fleet, job.drafters, job.ask, job.explains)) as policy:
            yield policy

    def _at_hand(self, job: Generation, specialists: Mapping[str, Specialist]) -> list[NgramSession]:
        """The drafters of this process; an application of the same name comes first."""
        ngram = self._args.ngram
        if ngram is None or ngram.name in specialists or ngram.name not in job.drafters:
            return []
        index = job.drafters.index(ngram.name)
        return [NgramSession(ngram.name, index, ngram.max_ngram, ngram.min_ngram)]

    async def _keep_on(self, panel: Panel, specialist: Specialist, index: int, at_once: bool) -> None:
        """Lease the specialist once it is wanted and keep it on the panel; another one when it is lost."""
        waits = self._args.lease_deadline_s, self._args.verify_deadline_s
        while True:
            try:
                if not at_once:
                    await panel.wanted(specialist.name, index)
                async with drafter_session(
                    self._pool, specialist.handle, specialist.name, index, *waits
                ) as session:
                    await panel.member(session)
            except (PeerGone, RayError, RayServeException) as error:
                logger.info("specialist %s is left out for now: %s", specialist.name, error)
                await asyncio.sleep(_REJOIN_DELAY_S)
