"""A serving system in simulated time: recorded texts and trees, measured costs, and the loop that serves.

Seconds pass on a clock that no machine slows down, so policies are compared at any load in a moment, to the
token. What a pass and a draft last comes from tables; that replicas on the same cores slow one another down is
simulated, what the network does is one constant.

Knows recordings, trees, tables and policies; never runs a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from taps.adaptive.lookups import Lookups
from taps.context import Context, ContextDelta
from taps.decoding.loop import decode
from taps.decoding.panel import Panel
from taps.decoding.policy import Policy
from taps.decoding.sessions import DrafterSession
from taps.drafting.drafter import Ask
from taps.drafting.ngram import NgramSession
from taps.engine.ahead import Looks, RunsAhead
from taps.engine.costs import Rhythm, StepCosts
from taps.engine.lingering import Lingering
from taps.engine.scheduling import StepBudget, share_nodes
from taps.engine.verification import accept
from taps.evaluation.replay import TreesByEnd
from taps.lookup import Lookup
from taps.session import SessionState
from taps.tree import ProposalTree
from taps.verdict import PassCost, Verdict

_USUAL_DEPTH = 5  # tokens of a path, that drafts' tables are about
_INSTANT_S = 1e-9
_LEVELS_ASIDE = 2.5  # of a draft, that what does not depend on its depth lasts as long as
T = TypeVar("T")
Job = TypeVar("Job")


@dataclass(frozen=True)
class Told:
    """A text that is known, and every drafter's tree at every position of its answer."""

    tokens: Sequence[int]
    answer_start: int
    trees: Mapping[str, TreesByEnd]


@dataclass(frozen=True)
class System:
    """What serves. Tables are seconds: of a pass by rows, of a drafter's usual draft by sessions."""

    passes: Mapping[int, float]
    drafts: Mapping[str, Mapping[int, float]]
    hop_s: float  # there and back, between a session's loop and a replica
    shares_cores: bool = True  # all replicas on the same ones
    loss: float = 0.0  # of what cores do, where several replicas compute at once
    budget: StepBudget = field(default_factory=StepBudget)
    ngram: str = ""  # the name of the drafter at hand; none where it is empty


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time goes on exactly when all tasks wait for it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        super().__init__(_Impatient(self))

    def time(self) -> float:
        return self._seconds

    def pass_time(self, seconds: float) -> None:
        self._seconds += seconds


class _Impatient(selectors.SelectSelector):
    """Never sleeps."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("all wait for one another")
        self._loop.pass_time(max(timeout, 0.0))
        return super().select(0)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing but time."""
    with contextlib.closing(VirtualLoop()) as loop:
        return loop.run_until_complete(main)


@dataclass(eq=False)
class _Work:
    left_s: float  # on cores of its own
    done: asyncio.Future[None]


class Cores:
    """What replicas compute on: everyone who does so at the same time has an equal part."""

    def __init__(self, loss: float = 0.0) -> None:
        self._loss = loss
        self._works: list[_Work] = []
        self._settled_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def compute(self, seconds: float) -> float:
        """Returns how long it lasted."""
        loop = asyncio.get_running_loop()
        began, work = loop.time(), _Work(seconds, loop.create_future())
        self._settle()
        self._works.append(work)
        self._set_timer()
        await work.done
        return loop.time() - began

    @property
    def _part(self) -> float:
        return (1.0 - self._loss * (len(self._works) > 1)) / max(len(self._works), 1)

    def _settle(self) -> None:
        now = asyncio.get_running_loop().time()
        for work in self._works:
            work.left_s -= (now - self._settled_at) * self._part
        self._settled_at = now

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._works:
            seconds = min(work.left_s for work in self._works) / self._part
            self._timer = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._finish)

    def _finish(self) -> None:
        self._settle()
        for work in [work for work in self._works if work.left_s < _INSTANT_S]:
            self._works.remove(work)
            if not work.done.done():
                work.done.set_result(None)
        self._set_timer()


class Replica(Generic[Job, T]):
    """Takes whatever waits, computes, and answers all at once."""

    def __init__(
        self,
        compute: Callable[[Sequence[Job]], tuple[float, Callable[[float], Sequence[T]]]],
        cores: Cores,
    ) -> None:
        """Args: compute: how long it lasts on cores of its own, and the answers by how long it lasted."""
        self._compute, self._cores = compute, cores
        self._waiting: list[tuple[Job, asyncio.Future[T]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._lingering, self._step_s, self._news = Lingering(), 0.0, asyncio.Event()

    async def submit(self, session: Hashable, job: Job) -> T:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._waiting.append((job, done))
        self._lingering.arrive(session, loop.time())
        done.add_done_callback(lambda _: self._lingering.leave(session, loop.time()))
        self._news.set()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self._waiting = [(job, done) for job, done in self._waiting if not done.done()]
            if not self._waiting:
                return
            now = asyncio.get_running_loop().time()
            if (wait_s := self._lingering.wait_s(len(self._waiting), self._step_s, now)) > 0:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()
                continue
            jobs, self._waiting = self._waiting, []
            seconds, answers = self._compute([job for job, _ in jobs])
            self._step_s = await self._cores.compute(seconds)
            for (_, done), answer in zip(jobs, answers(self._step_s), strict=True):
                if not done.done():
                    done.set_result(answer)


class _Verifier:
    """The verifier's rule for what is checked, with a table for a model."""

    def __init__(self, system: System, cores: Cores) -> None:
        self._system = system
        self.lookups = Lookups()
        self._table, self._costs, self._rhythm = StepCosts(system.passes), StepCosts(system.passes), Rhythm()
        self._replica: Replica[tuple[_TextSession, ProposalTree], Verdict] = Replica(self._step, cores)

    async def verify(self, session: _TextSession, tree: ProposalTree) -> Verdict:
        return await self._replica.submit(session, (session, tree))

    def _step(
        self, jobs: Sequence[tuple[_TextSession, ProposalTree]]
    ) -> tuple[float, Callable[[float], Sequence[Verdict]]]:
        began = asyncio.get_running_loop().time()

        def cost(nodes: int) -> float:
            return self._costs.seconds(len(jobs) + nodes) + self._rhythm.between_s

        trees = share_nodes([tree for _, tree in jobs], self._system.budget.tree_nodes, cost)
        rows = sum(map(len, trees))

        def verdicts(lasted_s: float) -> Sequence[Verdict]:
            self._rhythm.observe(began, began + lasted_s)
            self._costs.observe(rows, lasted_s)
            told = PassCost(rows, lasted_s * 1e3)
            return [
                replace(session.decide(tree), cost=told, batch_size=len(jobs))
                for (session, _), tree in zip(jobs, trees, strict=True)
            ]

        return self._table.seconds(rows), verdicts


class _TextSession:
    """Implements `taps.decoding.sessions.VerifierSession` for a text that is known."""

    numerics = "simulated"

    def __init__(self, text: Told, verifier: _Verifier, hop_s: float) -> None:
        self._text, self._verifier, self._hop_s = text, verifier, hop_s
        self._end = text.answer_start
        self._guesses = verifier.lookups.open(is_greedy=True)
        self._lookup: Lookup | None = None
        self._looks = Looks()
        self._plain = RunsAhead(self._decide_one, lambda: self._end >= len(text.tokens))

    async def prefill(self, state: SessionState, feature_window: int, tells: bool = True) -> Verdict:
        self._end = len(state.tokens) + 1
        return Verdict((self._text.tokens[self._end - 1],), (), torch.empty(0, 0), 0, 0, 1)

    async def verify(self, tree: ProposalTree) -> Verdict:
        await asyncio.sleep(self._hop_s / 2)
        verdict = await self._verifier.verify(self, tree)
        await asyncio.sleep(self._hop_s / 2)
        return verdict

    async def ahead(self, window: int, lookup: Lookup | None = None) -> Sequence[Verdict]:
        self._lookup = lookup
        verdicts = await self._plain.fetch(window)
        await asyncio.sleep(self._hop_s / 2)
        return verdicts

    async def close(self) -> None:
        await self._plain.close()

    def decide(self, tree: ProposalTree) -> Verdict:
        tokens, end = self._text.tokens, self._end

        def right(_: int, accepted: Sequence[int]) -> int:
            at = end + len(accepted)
            return tokens[at] if at < len(tokens) else -1

        found = accept(tree, right)
        self._end += len(found.tokens)
        depth = max(tree.depths)
        return Verdict(found.tokens, found.owners, torch.empty(0, 0), len(tree) - 1, depth, 1)

    async def _decide_one(self) -> Verdict:
        decided = self._text.tokens[: self._end]
        tree = ProposalTree.root_only(decided[-1])
        if self._lookup is not None and self._looks.now():
            tree = self._guesses.tree(decided, self._lookup)
        verdict = await self._verifier.verify(self, tree)
        if len(tree) > 1:
            self._looks.took(verdict.num_nodes > 0)
        return verdict


class _Drafter:
    """One specialist's replica: trees that are known, after as long as drafting lasts."""

    def __init__(self, table: Mapping[int, float], cores: Cores) -> None:
        self._costs = StepCosts(table)
        self._replica: Replica[int, None] = Replica(self._step, cores)

    async def draft(self, session: Hashable, depth: int) -> None:
        await self._replica.submit(session, depth)

    def _step(self, depths: Sequence[int]) -> tuple[float, Callable[[float], Sequence[None]]]:
        scale = (_LEVELS_ASIDE + max(depths)) / (_LEVELS_ASIDE + _USUAL_DEPTH)
        return scale * self._costs.seconds(len(depths)), lambda _: [None] * len(depths)


class _TreesSession:
    """Implements `taps.decoding.sessions.DrafterSession`."""

    is_at_hand = False

    lookup = None

    def __init__(self, name: str, index: int, trees: TreesByEnd, drafter: _Drafter, hop_s: float) -> None:
        self.name, self.index = name, index
        self._trees, self._drafter, self._hop_s = trees, drafter, hop_s

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        await asyncio.sleep(self._hop_s / 2)
        await self._drafter.draft(self, ask.depth + 1)
        await asyncio.sleep(self._hop_s / 2)
        tree = self._trees.get(delta.end) or ProposalTree.root_only(delta.root)
        return cut(tree, ask.depth + 1).prefix(ask.num_nodes)


def cut(tree: ProposalTree, depth: int) -> ProposalTree:
    """The tree without nodes deeper than that."""
    if max(tree.depths) <= depth:
        return tree
    kept = [node for node in range(len(tree)) if tree.depths[node] <= depth]
    place = {node: number for number, node in enumerate(kept)} | {-1: -1}
    return replace(
        tree,
        tokens=tuple(tree.tokens[n] for n in kept),
        parents=tuple(place[tree.parents[n]] for n in kept),
        scores=tuple(tree.scores[n] for n in kept),
        owners=tuple(tree.owners[n] for n in kept),
        entropies=tuple(tree.entropies[n] for n in kept) if tree.entropies else (),
    )


MakePolicy = Callable[[Sequence[str], Callable[[], float]], AbstractContextManager[Policy]]


async def serve(
    texts: Sequence[Told], streams: int, names: Sequence[str], make: MakePolicy, system: System
) -> float:
    """Tokens per second of so many streams, each answering the next text; call it with `run_virtually`.

    Args: names: of the drafters that may be asked; make: a policy for each answer.
    """
    loop = asyncio.get_running_loop()
    cores = Cores(system.loss)
    verifier = _Verifier(system, cores)
    drafters = {
        name: _Drafter(table, cores if system.shares_cores else Cores())
        for name, table in system.drafts.items()
    }
    waiting: Iterator[Told] = iter(texts)

    @asynccontextmanager
    async def open_session(text: Told) -> AsyncIterator[_TextSession]:
        async with contextlib.AsyncExitStack() as stack:
            session = _TextSession(text, verifier, system.hop_s)
            stack.push_async_callback(session.close)
            yield session

    def sessions_of(text: Told) -> Iterator[DrafterSession]:
        for index, name in enumerate(names):
            if name == system.ngram:
                yield NgramSession(name, index)
            else:
                yield _TreesSession(name, index, text.trees[name], drafters[name], system.hop_s)

    async def stream() -> int:
        tokens = 0
        for text in waiting:
            prompt = tuple(text.tokens[: text.answer_start])
            context = Context(SessionState(prompt), 0)
            panel = Panel([*sessions_of(text)], 600.0, clock=loop.time)
            with make(names, loop.time) as policy:
                steps = decode(context, partial(open_session, text), panel, policy, loop.time)
                async with aclosing(steps):
                    async for _ in steps:
                        if len(context.tokens) >= len(text.tokens):
                            break
            await panel.close()
            tokens += len(text.tokens) - text.answer_start
        return tokens

    counts = await asyncio.gather(*(stream() for _ in range(streams)))
    return sum(counts) / loop.time()
