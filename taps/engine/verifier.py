"""The target served to many sessions: what a verifier replica runs, and what decoding in one process uses.

Knows batching and the target; nothing of drafters, Ray or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from taps.engine.ahead import Guesser, Guesses, Looks, RunsAhead
from taps.engine.batching import Batcher
from taps.engine.grammars import Grammars, TextState
from taps.engine.jobs import Job, PrefillJob, TargetSession, VerifyJob
from taps.engine.target import Target
from taps.engine.threads import computing
from taps.lookup import Lookup
from taps.session import SessionState
from taps.tree import ProposalTree
from taps.verdict import InvalidGrammar, Verdict


class BatchedVerifier:
    """A target served to many sessions by continuous batching."""

    def __init__(
        self, target: Target, num_threads: int | None = None, guesser: Guesser | None = None,
        grammars: Grammars | None = None,
    ) -> None:  # fmt: skip
        """Args: num_threads: that its steps compute with (`taps.engine.threads`), None leaves it to torch;
        guesser: of plain decoding, where it is told to look tokens up; grammars: of texts that have one.
        """
        self.target = target
        self._guesser = guesser
        self._grammars = grammars
        self._batcher: Batcher[Job, Verdict] = Batcher(
            target.step, "verifier", computing(num_threads, target.model.in_kernel), lambda job: job.session
        )

    @asynccontextmanager
    async def session(self, beside: bool = False) -> AsyncIterator[BatchedVerifierSession]:
        """A session, until the block ends. Raises `CacheFull`.

        Args: beside: its owner has a session here that has a place, and this one needs none.
        """
        async with self._batcher.holding(lambda: self.target.open(beside), self.target.close) as state:
            session = BatchedVerifierSession(self._batcher, state, self.target, self._guesser, self._text)
            try:
                yield session
            finally:
                await session.close()

    async def _text(self, state: SessionState) -> TextState | None:
        """What is generated so far, where a grammar says what may come. Raises `InvalidGrammar`."""
        if not state.grammar:
            return None
        if self._grammars is None:
            raise InvalidGrammar("this verifier has no grammars")
        generated = state.tokens[len(state.tokens) - state.num_generated :]
        return await asyncio.to_thread(self._grammars.open, state.grammar, generated)

    async def warm_up(self) -> None:
        """Probe the target and run a short session: what is set up on first use is not in a user's time."""
        await self._batcher.between_steps(self.target.probe)
        await self._batcher.between_steps(self.target.profile)
        async with self.session() as session:
            (root,) = (await session.prefill(SessionState((0,) * 16), 1)).tokens
            nodes = [(token, parent, -1.0, 0) for token, parent in ((0, 0), (1, 0), (2, 1))]
            await session.verify(ProposalTree.ordered(root, nodes, len(nodes) + 1))

    def check(self) -> None:
        """Raise RuntimeError when it can do no more steps."""
        self._batcher.check()

    def close(self) -> None:
        self._batcher.close()


class BatchedVerifierSession:
    """Implements `taps.decoding.sessions.VerifierSession`."""

    def __init__(
        self, batcher: Batcher[Job, Verdict], state: TargetSession, target: Target, guesser: Guesser | None,
        text: Callable[[SessionState], Awaitable[TextState | None]],
    ) -> None:  # fmt: skip
        self.numerics = target.numerics
        self._target = target
        self._batcher = batcher
        self._state = state
        self._text = text
        self._feature_window = 1 << 30
        self._num_untold = 0  # positions whose features were not told
        self._guesser = guesser
        self._guesses: Guesses | None = None  # since the prefill
        self._lookup: Lookup | None = None
        self._looks = Looks()
        self._plain = RunsAhead(self._decide_one, lambda: state.is_over)

    async def prefill(self, state: SessionState, feature_window: int, tells: bool = True) -> Verdict:
        self._feature_window, self._num_untold = feature_window, 0 if tells else len(state.tokens)
        if self._guesser is not None:
            self._guesses = self._guesser.open(state.sampling.greedy)
        text = await self._text(state)
        return await self._batcher.submit(PrefillJob(self._state, state, feature_window if tells else 0, text))

    async def verify(self, tree: ProposalTree) -> Verdict:
        verdict = await self._batcher.submit(VerifyJob(self._state, tree))
        return verdict if self._feature_window else replace(verdict, features=verdict.features[:0])

    async def ahead(self, window: int, lookup: Lookup | None = None) -> list[Verdict]:
        self._lookup = lookup
        verdicts = await self._plain.fetch(window)
        self._num_untold += sum(len(verdict.tokens) for verdict in verdicts)
        if window or not self._feature_window:
            return verdicts
        count, self._num_untold = min(self._num_untold, self._feature_window), 0
        newest = await self._batcher.between_steps(lambda: self._target.features_of(self._state, count))
        *others, last = verdicts or [Verdict((), (), newest, 0, 0, 1)]
        return [*others, replace(last, features=newest)]

    async def close(self) -> None:
        await self._plain.close()

    async def _decide_one(self) -> Verdict:
        tokens = self._state.tokens
        tree = ProposalTree.root_only(tokens[-1])
        if self._guesses is not None and self._lookup is not None and self._looks.now():
            tree = self._guesses.tree(tokens, self._lookup)
        verdict = await self._batcher.submit(VerifyJob(self._state, tree))
        if len(tree) > 1:
            self._looks.took(verdict.num_nodes > 0)
        return verdict
