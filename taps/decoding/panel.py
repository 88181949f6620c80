"""The panel of one session's drafters: who is asked in a step, and how long they are waited for.

Knows drafter sessions and deadlines; nothing of composing or verifying.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from taps.context import Context
from taps.decoding.policy import Arrived, Candidate, Offer, Question
from taps.decoding.sessions import DrafterSession
from taps.drafting.drafter import Ask
from taps.lookup import Lookup
from taps.peers import PeerGone
from taps.tree import ProposalTree

_GOES_OUT_S = 0.001  # a question, by then, where others keep the router busy too
_ASIDE = 64  # features that a drafter is told, at most, who is asked aside: more would cost more than it tells


class Asked(NamedTuple):
    """Questions that are waited for."""

    at: float  # when they were asked
    waits_s: float  # for the answers, from then on
    tasks: Mapping[DrafterSession, asyncio.Task[Arrived]]

    async def have_gone_out(self) -> None:
        """What is done from now on is done while drafters are at work."""
        if self.tasks and self.waits_s > _GOES_OUT_S:
            await asyncio.wait(self.tasks.values(), timeout=_GOES_OUT_S)


class Panel:
    """The drafters of one session: asked all at once, never waited for beyond the deadline.

    The deadline is `deadline_s` seconds, or `patience` times what the last verify pass took if that is less:
    a drafter slower than the target costs more than it saves.

    A drafter that is late is left out of this step and asked again once its answer has arrived; one that
    is gone is left out for good. Members may come and go while the session runs: see `member`. Every answer can
    be learned from: see `take_arrived`.
    """

    def __init__(
        self, drafters: Sequence[DrafterSession], deadline_s: float, patience: float = math.inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._deadline_s = deadline_s
        self._patience = patience
        self._known: dict[DrafterSession, int] = dict.fromkeys(drafters, 0)
        self._pending: dict[DrafterSession, asyncio.Task[Arrived]] = {}
        self._lost: dict[DrafterSession, asyncio.Future[None]] = {}
        self._arrived: list[Arrived] = []
        self._offers: list[Offer] = []

    async def wanted(self, name: str, index: int) -> None:
        """Offer a drafter who is not there yet: until someone wants to ask it, or the call is cancelled."""
        offer = Offer(name, index)
        self._offers.append(offer)
        try:
            await offer.taken.wait()
        finally:
            self._offers.remove(offer)

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

    @property
    def is_empty(self) -> bool:
        """Whether nobody is there, nor offered."""
        return not self._known and not self._offers

    @property
    def lookup(self) -> Lookup | None:
        """What a verifier that decodes plainly may draft by itself, as one of the drafters at hand does."""
        return next((drafter.lookup for drafter in self._known if drafter.lookup is not None), None)

    def idle(self) -> list[Candidate]:
        """Those that may be asked: a late answer, if they owed one, has arrived. Not those at hand."""
        there = [drafter for drafter in list(self._known) if not drafter.is_at_hand and self._is_idle(drafter)]
        return [*there, *self._offers]

    async def at_hand(self, context: Context, ask: Ask) -> list[ProposalTree]:
        """The trees of drafters of this process, which nobody waits for."""
        here = [drafter for drafter in self._known if drafter.is_at_hand]
        answers = [await self._question(drafter, context, ask) for drafter in here]
        return [tree for one in answers if (tree := self._take(one)) is not None and len(tree) > 1]

    def ask(self, context: Context, asked: Mapping[Candidate, Question], pass_s: float = math.inf) -> Asked:
        """Ask those that are idle; one that is only offered is sent for, and can be asked once it is there.

        Args: pass_s: seconds the last verify pass took.
        """
        questions: dict[DrafterSession, Question] = {}
        for drafter, question in asked.items():
            if isinstance(drafter, Offer):
                drafter.taken.set()
            else:
                questions[drafter] = question
        tasks = {
            drafter: asyncio.create_task(self._question(drafter, context, *question))
            for drafter, question in questions.items()
        }
        self._pending |= tasks
        awaited = {drafter: task for drafter, task in tasks.items() if questions[drafter].is_waited_for}
        return Asked(self._clock(), min(self._deadline_s, self._patience * pass_s), awaited)

    async def answers(self, asked: Asked, root: int) -> list[ProposalTree]:
        """Wait for those that are waited for: trees from `root` that come in time, owned by their drafters."""
        if asked.tasks:
            left_s = asked.waits_s - (self._clock() - asked.at)
            await asyncio.wait(asked.tasks.values(), timeout=max(left_s, 0.0))
        trees = []
        for drafter, task in asked.tasks.items():
            if not task.done():
                continue
            del self._pending[drafter]
            tree = self._take(task.result())
            if tree is not None and tree.tokens[0] == root:
                trees.append((drafter.index, tree))
        return [tree for _, tree in sorted(trees, key=lambda pair: pair[0])]

    def take_arrived(self) -> list[Arrived]:
        """The answers that came since the last call, late ones too."""
        arrived, self._arrived = self._arrived, []
        return arrived

    async def _question(
        self, drafter: DrafterSession, context: Context, ask: Ask, is_waited_for: bool = True
    ) -> Arrived:
        """One answer; without a tree where the drafter is gone."""
        known, end, began = self._known[drafter], len(context.tokens), self._clock()
        if drafter.is_at_hand:
            delta = context.tokens_since(known)
        else:
            delta = context.since(known, None if is_waited_for else _ASIDE)
        self._known[drafter] = end
        try:
            tree = (await drafter.propose(delta, ask)).owned_by(drafter.index)
        except PeerGone as error:
            self._known.pop(drafter, None)
            if drafter in self._lost:
                self._lost[drafter].set_exception(error)
            return Arrived(drafter, ask, end, None, 0.0, 0)
        return Arrived(drafter, ask, end, tree, self._clock() - began, len(delta.tokens))

    def _take(self, one: Arrived) -> ProposalTree | None:
        self._arrived.append(one)
        return one.tree

    def _is_idle(self, drafter: DrafterSession) -> bool:
        task = self._pending.get(drafter)
        if task is None:
            return True
        if not task.done():
            return False
        del self._pending[drafter]
        return self._take(task.result()) is not None

    async def close(self) -> None:
        """Cancel what is still owed; the drafters' sessions belong to whoever opened them."""
        for task in self._pending.values():
            task.cancel()
        await asyncio.gather(*self._pending.values(), return_exceptions=True)
        self._pending.clear()
