"""The steps that `taps bench steps` times: real sessions of target and drafter, kept at about one length.

Every step commits what it decides, so a session grows by a token or more each time; one that has grown by
`DRIFT` is opened again, which is not timed. Texts are the target's own, written at temperature 1. The nodes of
trees are arbitrary tokens, so nearly always the root alone is accepted.

Knows the target, drafters and their jobs; nothing of floors, rounds or tables.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from taps.context import ContextDelta
from taps.drafting.drafter import Ask, DraftJob
from taps.drafting.eagle import EagleDrafter, EagleSession
from taps.engine.batching import Blocked
from taps.engine.jobs import Job, PrefillJob, TargetSession, VerifyJob
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.models.cache import PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.kernel_operations import cpu_race
from taps.models.step import Segment
from taps.sampling import sample_rows
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import NO_PARENT, ProposalTree
from taps.verdict import Verdict

DRIFT = 32  # positions
T = TypeVar("T")


class Text(NamedTuple):
    """What the target wrote, and its features."""

    tokens: tuple[int, ...]  # [n + 1]
    features: Tensor  # [n, H]

    def first(self, num_tokens: int) -> tuple[int, ...]:
        """So many tokens, from the start again where there are fewer."""
        return tuple(islice(cycle(self.tokens), num_tokens))


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds, and what came out."""
    started = time.perf_counter()
    result = run()
    return 1000 * (time.perf_counter() - started), result


def branching(root: int, rows: int, first: int, vocab_size: int) -> ProposalTree:
    """A tree of so many rows in which nodes have two children each. Args: first: picks its tokens."""
    tokens = ((7919 * (first + i) + 11) % vocab_size for i in range(1, rows))
    parents = ((i - 1) // 2 for i in range(1, rows))
    scores = tuple(-0.1 * i for i in range(rows))
    return ProposalTree((root, *tokens), (NO_PARENT, *parents), scores, (0, *([1] * (rows - 1))))


def stepped(target: Target, jobs: Sequence[Job]) -> list[Verdict | None]:
    """One step. Raises what a job got instead of its verdict."""
    return [_taken(result) for result in target.step(jobs)]


def _taken(result: T | Exception | Blocked) -> T:
    if isinstance(result, Exception):
        raise result
    assert not isinstance(result, Blocked), "there is room for all sessions"
    return result


def prefilled(target: Target, jobs: Sequence[PrefillJob]) -> list[Verdict]:
    """As many steps as they need."""
    verdicts: dict[PrefillJob, Verdict] = {}
    while waiting := [job for job in jobs if job not in verdicts]:
        found = zip(waiting, stepped(target, waiting), strict=True)
        verdicts |= {job: verdict for job, verdict in found if verdict is not None}
    return [verdicts[job] for job in jobs]


def write_texts(model: CausalLM, num_texts: int, num_tokens: int) -> list[Text]:
    """Texts of so many tokens and one more, decoded plainly, side by side."""
    target = Target(model, num_texts, num_tokens + 1, StepBudget(tree_nodes=0))
    sessions = [target.open() for _ in range(num_texts)]
    starts = [(7919 * i + 11) % model.vocab_size for i in range(num_texts)]
    states = [SessionState((start,), sampling=SamplingParams(choice=i)) for i, start in enumerate(starts)]
    prompts = [PrefillJob(session, state) for session, state in zip(sessions, states, strict=True)]
    steps = [prefilled(target, prompts)]
    for _ in range(num_tokens - 1):
        jobs = [
            VerifyJob(session, ProposalTree.root_only(verdict.tokens[-1]))
            for session, verdict in zip(sessions, steps[-1], strict=True)
        ]
        steps.append([verdict for verdict in stepped(target, jobs) if verdict is not None])
    return [
        Text((start, *(v.tokens[0] for v in verdicts)), torch.cat([v.features for v in verdicts]))
        for start, *verdicts in zip(starts, *steps, strict=True)
    ]


class _Open:
    """A session of the target, and the newest token."""

    def __init__(self, session: TargetSession, root: int) -> None:
        self.session = session
        self.root = root
        self.grown = 0

    def take_in(self, verdict: Verdict) -> None:
        self.root = verdict.tokens[-1]
        self.grown += len(verdict.tokens)


class Verifying:
    """Sessions of one length, which the cases of that length share in turn."""

    def __init__(self, model: CausalLM, texts: Sequence[Text], context: int, tree_nodes: int) -> None:
        """Args: texts: one for each session; tree_nodes: that a step has at most, roots not counted."""
        max_len = positions_for(context, tree_nodes)
        self._target = Target(model, len(texts), max_len, StepBudget(tree_nodes=tree_nodes))
        self._context = context
        self._vocab_size = model.vocab_size
        self._steps = 0
        self._sessions = deque((self._opened(text), text) for text in texts)

    def step(self, num_sessions: int, rows: int) -> float:
        """Milliseconds of verifying a tree of so many rows for each of so many sessions."""
        sessions = self._next(num_sessions)
        self._steps += 1
        jobs = [VerifyJob(o.session, self._tree(o.root, rows, i)) for i, o in enumerate(sessions)]
        ms, verdicts = timed(lambda: stepped(self._target, jobs))
        for opened, verdict in zip(sessions, verdicts, strict=True):
            assert verdict is not None, "trees are verified in one step"
            opened.take_in(verdict)
        return ms

    def _tree(self, root: int, rows: int, number: int) -> ProposalTree:
        return branching(root, rows, 1000 * self._steps + 64 * number, self._vocab_size)

    def _next(self, num_sessions: int) -> list[_Open]:
        for i in range(num_sessions):
            opened, text = self._sessions[i]
            if opened.grown >= DRIFT:
                self._target.close(opened.session)
                self._sessions[i] = self._opened(text), text
        chosen = [opened for opened, _ in islice(self._sessions, num_sessions)]
        self._sessions.rotate(-num_sessions)
        return chosen

    def _opened(self, text: Text) -> _Open:
        session = self._target.open()
        (verdict,) = prefilled(self._target, [PrefillJob(session, SessionState(text.first(self._context)))])
        return _Open(session, verdict.tokens[-1])


def positions_for(context: int, tree_nodes: int) -> int:
    """That a target needs to verify trees for sessions of `context` positions and those they grow by."""
    return context + DRIFT + tree_nodes + 2


class Prefilling:
    """A prompt that goes on behind `context` positions, each time in a session of its own."""

    def __init__(self, model: CausalLM, text: Text, context: int, rows: int) -> None:
        self._target = Target(model, 1, context + rows + 1, StepBudget(tree_nodes=0))
        self._tokens, self._chunks = text.first(context + rows), [n for n in (context, rows) if n]
        self._number = 0

    def step(self) -> float:
        """Milliseconds of one step over the rows, with logits of the last one."""
        session = self._target.open()
        self._number += 1  # nothing is found again
        job = PrefillJob(session, SessionState(self._tokens, cache_salt=str(self._number)))
        for chunk in self._chunks:
            self._target.budget = StepBudget(prefill_tokens=chunk, tree_nodes=0)
            ms, _ = timed(lambda: stepped(self._target, [job]))
        self._target.close(session)
        return ms


class _Reader:
    """A drafter's session that follows a text: a token each time, and after `DRIFT` of them all over again."""

    def __init__(self, session: EagleSession, text: Text, context: int) -> None:
        self.session = session
        self._text = text
        self._context = context
        self.known = 0

    def news(self) -> ContextDelta:
        """The whole context where nothing is known of it, else one token more."""
        start = self.known
        self.known = start + 1 if start else self._context
        first = max(start - 1, 0)
        features = self._text.features[first : self.known - 1]
        return ContextDelta(start, self._text.tokens[start : self.known], first, features)

    @property
    def is_read(self) -> bool:
        return self.known >= self._context + DRIFT


class Drafting:
    """Sessions of a drafter that are drafted for together. The text must have `context` + `DRIFT` tokens."""

    def __init__(self, drafter: EagleDrafter, texts: Sequence[Text], context: int, ask: Ask) -> None:
        self._drafter = drafter
        self._ask = ask
        self._readers = [_Reader(drafter.open(), text, context) for text in texts]

    def step(self) -> tuple[float, list[ProposalTree]]:
        """Milliseconds of taking in a token for each session and drafting, and the trees."""
        for reader in self._readers:
            if reader.known == 0 or reader.is_read:
                reader.known = 0  # the drafter forgets a past that the news do not join
                self._draft([reader])
        return timed(lambda: self._draft(self._readers))

    def _draft(self, readers: Sequence[_Reader]) -> list[ProposalTree]:
        jobs = [DraftJob(reader.session, reader.news(), self._ask) for reader in readers]
        return [tree for result in self._drafter.step(jobs) if (tree := _taken(result)) is not None]


def last_logits(model: CausalLM, tokens: Sequence[int], num_rows: int) -> Tensor:
    """[num_rows, V] at a text's positions from the last one back, and around where it is short."""
    cache = PagedCache(1, len(tokens))
    sequence = cache.open()
    cache.reserve(sequence, len(tokens))
    keep = [-(i + 1) % len(tokens) for i in range(num_rows)]
    return model.extend([Segment(sequence, len(tokens))], tokens, keep, cache)[1]


@torch.inference_mode()
def decide(logits: Tensor, params: Sequence[SamplingParams], position: int) -> list[int]:
    """The token of every session at one position. Args: logits [sessions, V]."""
    n = len(params)
    decided = sample_rows(logits, params, [position] * n, [{}] * n, cpu_race() if logits.is_cpu else None)
    return [_taken(token) for token in decided]
