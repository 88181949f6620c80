"""Verifier and drafters in this process: the plain twins of the deployments.

Training, evaluation and tests decode through these; the deployments serve the very same objects.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from typing import Any

from taps.batching import Batcher
from taps.context import ContextDelta
from taps.drafting.drafter import Ask, Drafter, DraftJob
from taps.sampling import SamplingParams
from taps.target import Job, PrefillJob, Target, TargetSession, VerifyJob
from taps.threads import compute_with
from taps.tree import ProposalTree
from taps.verdict import Verdict


def _preparation(num_threads: int | None) -> Callable[[], None]:
    return lambda: None if num_threads is None else compute_with(num_threads)


class LocalVerifier:
    """A target served to many sessions by continuous batching."""

    def __init__(self, target: Target, num_threads: int | None = None) -> None:
        """Args: num_threads: that its steps compute with (`taps.threads`); None leaves it to torch."""
        self.target = target
        self._batcher: Batcher[Job, Verdict] = Batcher(target.step, "verifier", _preparation(num_threads))

    @asynccontextmanager
    async def session(self, params: SamplingParams) -> AsyncIterator[LocalVerifierSession]:
        """A session that owns a cache slot until the block ends. Raises `CacheFull`."""
        async with self._batcher.holding(lambda: self.target.open(params), self.target.close) as state:
            yield LocalVerifierSession(self._batcher, state)

    async def warm_up(self) -> None:
        """Run a short session: what is set up on first use is not set up in a user's time."""
        async with self.session(SamplingParams()) as session:
            (root,) = (await session.prefill([0] * 16, 0, 1)).tokens
            nodes = [(token, parent, -1.0, 0) for token, parent in ((0, 0), (1, 0), (2, 1))]
            await session.verify(ProposalTree.ordered(root, nodes, len(nodes) + 1))

    def check(self) -> None:
        """Raise RuntimeError when it can do no more steps."""
        self._batcher.check()

    def close(self) -> None:
        self._batcher.close()


class LocalVerifierSession:
    """Implements `taps.decoding.VerifierSession`."""

    def __init__(self, batcher: Batcher[Job, Verdict], state: TargetSession) -> None:
        self._batcher = batcher
        self._state = state

    async def prefill(self, tokens: Sequence[int], num_generated: int, feature_window: int) -> Verdict:
        generated = tokens[len(tokens) - num_generated :]
        return await self._batcher.submit(
            PrefillJob(self._state, tokens, generated=generated, feature_window=feature_window)
        )

    async def verify(self, tree: ProposalTree) -> Verdict:
        return await self._batcher.submit(VerifyJob(self._state, tree))


class LocalDrafter:
    """A drafter served to many sessions by batching whatever they ask at the same time."""

    def __init__(self, name: str, drafter: Drafter, num_threads: int | None = None) -> None:
        """Args: num_threads: as the verifier's."""
        self.name = name
        self._drafter = drafter
        self._batcher: Batcher[DraftJob, ProposalTree] = Batcher(
            drafter.step, f"drafter-{name}", _preparation(num_threads)
        )

    @asynccontextmanager
    async def session(self, index: int = 0) -> AsyncIterator[LocalDrafterSession]:
        """A session whose nodes are marked with bit `index`. Raises `CacheFull`."""
        async with self._batcher.holding(self._drafter.open, self._drafter.close) as state:
            yield LocalDrafterSession(self._batcher, state, self.name, index)

    def check(self) -> None:
        """Raise RuntimeError when it can do no more steps."""
        self._batcher.check()

    def close(self) -> None:
        self._batcher.close()


class LocalDrafterSession:
    """Implements `taps.decoding.DrafterSession`."""

    def __init__(self, batcher: Batcher[DraftJob, ProposalTree], state: Any, name: str, index: int) -> None:
        self._batcher = batcher
        self._state = state
        self.name = name
        self.index = index

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        return await self._batcher.submit(DraftJob(self._state, delta, ask))


@contextmanager
def in_process(
    target: Target, drafters: Iterable[tuple[str, Drafter]], num_threads: int
) -> Iterator[tuple[LocalVerifier, list[LocalDrafter]]]:
    """The target with so many threads and the named drafters with one each, closed when the block ends."""
    with ExitStack() as stack:
        verifier = stack.enter_context(closing(LocalVerifier(target, num_threads)))
        panel = [LocalDrafter(name, drafter, num_threads=1) for name, drafter in drafters]
        yield verifier, [stack.enter_context(closing(drafter)) for drafter in panel]
