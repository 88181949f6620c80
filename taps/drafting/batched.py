"""A drafter served to many sessions: what a specialist's replica runs, and what decoding in one process uses.

Knows batching and drafters; nothing of the verifier, Ray or HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from taps.context import ContextDelta
from taps.drafting.drafter import Ask, Drafter, DraftJob
from taps.engine.batching import Batcher
from taps.engine.threads import computing
from taps.tree import ProposalTree


class BatchedDrafter:
    """A drafter served to many sessions by batching whatever they ask at the same time."""

    def __init__(self, name: str, drafter: Drafter, num_threads: int | None = None) -> None:
        """Args: num_threads: as the verifier's."""
        self.name = name
        self._drafter = drafter
        self._batcher: Batcher[DraftJob, ProposalTree] = Batcher(
            drafter.step, f"drafter-{name}", computing(num_threads, drafter.in_kernel), lambda job: job.session
        )

    async def profile(self) -> dict[int, float]:
        """Seconds of a usual draft by sessions that ask, measured now; nothing where that is no time."""
        return await self._batcher.between_steps(self._drafter.profile)

    @asynccontextmanager
    async def session(self, index: int = 0) -> AsyncIterator[BatchedDrafterSession]:
        """A session whose nodes are marked with bit `index`. Raises `CacheFull`."""
        async with self._batcher.holding(self._drafter.open, self._drafter.close) as state:
            yield BatchedDrafterSession(self._batcher, state, self.name, index)

    def check(self) -> None:
        """Raise RuntimeError when it can do no more steps."""
        self._batcher.check()

    def close(self) -> None:
        self._batcher.close()


class BatchedDrafterSession:
    """Implements `taps.decoding.sessions.DrafterSession`."""

    is_at_hand = False

    lookup = None

    def __init__(self, batcher: Batcher[DraftJob, ProposalTree], state: Any, name: str, index: int) -> None:
        self._batcher = batcher
        self._state = state
        self.name = name
        self.index = index

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        return await self._batcher.submit(DraftJob(self._state, delta, ask))
