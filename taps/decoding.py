"""The decoding loop: propose, compose, verify (which accepts and commits), deliver.

Drafters and verifiers are two small async protocols; whether they live in this process or on another
machine is not known here. Plain decoding is the same loop without drafters.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from taps.composing import Compose
from taps.context import Context, ContextDelta
from taps.drafting.drafter import Ask
from taps.tree import ProposalTree
from taps.verdict import Verdict

# Wait before another verifier is tried, doubled each time: eight tries span the restart of a replica.
_FAILOVER_DELAY_S = 0.2


class DrafterGone(ConnectionError):
    """The drafter's process is lost; the session goes on without it."""


class VerifierGone(ConnectionError):
    """The verifier's process is lost; the session must resume on another one."""


class VerifierBusy(VerifierGone):
    """No verifier has room for the session now."""


class DrafterSession(Protocol):
    """One session's side of a drafter."""

    index: int  # the bit that marks its nodes
    name: str

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        """Take in what the target decided since the last call and draft from the new root.

        Raises `DrafterGone`.
        """
        ...


class VerifierSession(Protocol):
    """One session's side of the verifier."""

    async def prefill(self, tokens: Sequence[int], num_generated: int, feature_window: int) -> Verdict:
        """Append tokens, the last `num_generated` of them generated before; decide one more token."""
        ...

    async def verify(self, tree: ProposalTree) -> Verdict:
        """Check a tree whose root is the token decided last. Raises `VerifierGone`."""
        ...


@dataclass(frozen=True)
class Step:
    """What one turn of the loop delivered."""

    verdict: Verdict
    is_prefill: bool
    draft_ms: float  # waiting for drafters
    verify_ms: float  # waiting for the verifier
    drafted: tuple[int, ...] = ()  # owner bits of the drafted nodes that were checked


async def decode(
    context: Context,
    open_verifier: Callable[[], AbstractAsyncContextManager[VerifierSession]],
    panel: Panel,
    compose: Compose,
    ask: Ask,
    max_failovers: int = 8,
) -> AsyncGenerator[Step, None]:
    """Decode until the caller closes the generator (`contextlib.aclosing` frees the verifier's session).

    `context` holds the prompt. When the verifier is lost, what was decided so far is prefilled on another
    one and decoding goes on: the noise depends on positions alone, so the text is the same. Raises
    `VerifierGone` after `max_failovers` in a row, and `VerifierBusy` at once where nothing is decided yet.
    """
    failures = 0
    while True:
        try:
            async with open_verifier() as verifier:
                async for step in _decode_on(verifier, context, panel, compose, ask):
                    yield step
                    if not step.is_prefill:
                        failures = 0
        except VerifierGone as error:
            turned_away = isinstance(error, VerifierBusy) and not context.num_generated
            if turned_away or failures >= max_failovers:
                raise
            await asyncio.sleep(_FAILOVER_DELAY_S * 2**failures)
            failures += 1


async def _decode_on(
    verifier: VerifierSession, context: Context, panel: Panel, compose: Compose, ask: Ask
) -> AsyncGenerator[Step, None]:
    """Decode on one verifier session, fresh at the start."""
    started = time.perf_counter()
    verdict = await verifier.prefill(context.tokens, context.num_generated, context.feature_window)
    context.restart(verdict)
    yield Step(verdict, True, 0.0, (time.perf_counter() - started) * 1e3)
    pass_s = math.inf  # unknown before the first
    while True:
        started = time.perf_counter()
        trees = await panel.propose(context, ask, pass_s)
        tree = compose(trees, context.root, ask.num_nodes)
        drafted = time.perf_counter()
        verdict = await verifier.verify(tree)
        context.extend(verdict)
        verified = time.perf_counter()
        pass_s = verified - drafted
        checked = tree.owners[1 : 1 + verdict.num_nodes]
        yield Step(verdict, False, (drafted - started) * 1e3, (verified - drafted) * 1e3, checked)


class Panel:
    """The drafters of one session: asked all at once, never waited for beyond the deadline.

    The deadline is `deadline_s` seconds, or `patience` times what the last verify pass took if that is less:
    a drafter slower than the target costs more than it saves.

    A drafter that is late is left out of this step and asked again once its answer has arrived; one that
    is gone is left out for good. Members may come and go while the session runs: see `member`.
    """

    def __init__(
        self, drafters: Sequence[DrafterSession] = (), deadline_s: float = 1.0, patience: float = math.inf
    ) -> None:
        self._deadline_s = deadline_s
        self._patience = patience
        self._known: dict[DrafterSession, int] = dict.fromkeys(drafters, 0)
        self._pending: dict[DrafterSession, asyncio.Task[ProposalTree]] = {}
        self._lost: dict[DrafterSession, asyncio.Future[None]] = {}

    async def member(self, drafter: DrafterSession) -> None:
        """Put a drafter on the panel until it is lost, which raises its `DrafterGone`, or cancelled."""
        lost = self._lost[drafter] = asyncio.get_running_loop().create_future()
        self._known[drafter] = 0
        try:
            await lost
        finally:
            self._known.pop(drafter, None)
            del self._lost[drafter]

    @property
    def drafters(self) -> list[DrafterSession]:
        return list(self._known)

    async def propose(self, context: Context, ask: Ask, pass_s: float = math.inf) -> list[ProposalTree]:
        """The trees of the drafters that answered in time, each owned by its drafter.

        Args: pass_s: seconds the last verify pass took.
        """
        asked = [drafter for drafter in list(self._known) if self._idle(drafter)]
        tasks = {drafter: self._ask(drafter, context, ask) for drafter in asked}
        self._pending |= tasks
        if tasks:
            await asyncio.wait(tasks.values(), timeout=min(self._deadline_s, self._patience * pass_s))
        trees = []
        for drafter, task in tasks.items():
            if not task.done():
                continue
            del self._pending[drafter]
            if (tree := self._tree_of(drafter, task)) is not None and tree.tokens[0] == context.root:
                trees.append((drafter.index, tree.owned_by(drafter.index)))
        return [tree for _, tree in sorted(trees, key=lambda pair: pair[0])]

    def _ask(self, drafter: DrafterSession, context: Context, ask: Ask) -> asyncio.Task[ProposalTree]:
        delta = context.since(self._known[drafter])
        self._known[drafter] = len(context.tokens)
        return asyncio.create_task(_as_coroutine(drafter, delta, ask))

    def _idle(self, drafter: DrafterSession) -> bool:
        """Whether the drafter may be asked: its late answer, if it owed one, has arrived."""
        task = self._pending.get(drafter)
        if task is None:
            return True
        if not task.done():
            return False
        del self._pending[drafter]
        return self._tree_of(drafter, task) is not None

    def _tree_of(self, drafter: DrafterSession, task: asyncio.Task[ProposalTree]) -> ProposalTree | None:
        """The task's tree; None when the drafter is gone, which takes it off the panel."""
        try:
            return task.result()
        except DrafterGone as error:
            self._known.pop(drafter, None)
            if drafter in self._lost:
                self._lost[drafter].set_exception(error)
            return None

    async def close(self) -> None:
        """Cancel what is still owed; the drafters' sessions belong to whoever opened them."""
        for task in self._pending.values():
            task.cancel()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)
        self._pending.clear()


async def _as_coroutine(drafter: DrafterSession, delta: ContextDelta, ask: Ask) -> ProposalTree:
    return await drafter.propose(delta, ask)
