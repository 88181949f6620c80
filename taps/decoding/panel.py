"""The panel of one session's drafters: who is asked in a step, and how long they are waited for.

Knows drafter sessions and deadlines; nothing of composing or verifying.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from taps.context import Context, ContextDelta
from taps.decoding.sessions import DrafterSession
from taps.drafting.drafter import Ask
from taps.peers import PeerGone
from taps.tree import ProposalTree


class Panel:
    """The drafters of one session: asked all at once, never waited for beyond the deadline.

    The deadline is `deadline_s` seconds, or `patience` times what the last verify pass took if that is less:
    a drafter slower than the target costs more than it saves.

    A drafter that is late is left out of this step and asked again once its answer has arrived; one that
    is gone is left out for good. Members may come and go while the session runs: see `member`.
    """

    def __init__(
        self, drafters: Sequence[DrafterSession], deadline_s: float, patience: float = math.inf
    ) -> None:
        self._deadline_s = deadline_s
        self._patience = patience
        self._known: dict[DrafterSession, int] = dict.fromkeys(drafters, 0)
        self._pending: dict[DrafterSession, asyncio.Task[ProposalTree]] = {}
        self._lost: dict[DrafterSession, asyncio.Future[None]] = {}

    async def member(self, drafter: DrafterSession) -> None:
        """Put a drafter on the panel until it is lost, which raises its `PeerGone`, or cancelled."""
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
        except PeerGone as error:
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
