"""What the loop asks before and after every step: whom to ask for what, how to compose, and what came of it.

A fixed strategy asks everyone for the same; the adaptive one learns (`taps.adaptive`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

from taps.composing import Compose
from taps.context import Context
from taps.decoding.sessions import DrafterSession
from taps.drafting.drafter import Ask
from taps.tree import ProposalTree
from taps.verdict import Verdict


class Offer:
    """A drafter who is not there yet, and comes if it is wanted."""

    is_at_hand = False

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index = name, index
        self.taken = asyncio.Event()


Candidate: TypeAlias = DrafterSession | Offer


class Question(NamedTuple):
    """What a drafter is asked."""

    ask: Ask
    is_waited_for: bool = True  # in this step; else its answer is only learned from


@dataclass(frozen=True)
class Plan:
    """What a step does."""

    questions: Mapping[Candidate, Question] = field(default_factory=dict)
    is_plain: bool = False  # the verifier decodes by itself
    tells_all: bool = False  # every verdict has its features, also where nobody drafts
    rest: int = 0  # tokens after this one that need no plan, where the verifier decodes by itself

    @property
    def asks(self) -> bool:
        """Whether somebody is asked now, and not only sent for."""
        return not all(isinstance(candidate, Offer) for candidate in self.questions)

    def among(self, idle: Sequence[Candidate]) -> Plan:
        """The same, of those who may still be asked."""
        return replace(self, questions={one: self.questions[one] for one in idle if one in self.questions})


class Arrived(NamedTuple):
    """A drafter's answer, late or not."""

    drafter: DrafterSession
    ask: Ask
    end: int  # tokens decided when it was asked, the root included
    tree: ProposalTree | None  # None where there is none to come
    seconds: float
    news: int  # tokens it had to take in


@dataclass(frozen=True)
class Step:
    """What one turn of the loop delivered."""

    verdict: Verdict
    is_prefill: bool
    draft_ms: float  # waiting for drafters
    verify_ms: float  # waiting for the verifier
    drafted: tuple[int, ...] = ()  # owner bits of the drafted nodes that were checked
    numerics: str = ""  # of the verifier, at a prefill
    why: Mapping[str, Any] | None = None  # where the policy says what it did


class Policy(Protocol):
    """One session's."""

    ask: Ask  # of drafters that are at hand, whom asking costs nothing
    begins_asking: bool  # somebody, right after the prefill, as far as is known

    def likely(self, names: Sequence[str]) -> Sequence[str]:
        """Those that will be asked at once, as far as is known before the session began."""
        ...

    @property
    def looks(self) -> bool:
        """Whether a verifier that decodes plainly may draft by itself."""
        ...

    def plan(self, context: Context, idle: Sequence[Candidate], free: Sequence[ProposalTree]) -> Plan:
        """Args: idle: drafters that may be asked; free: trees of those at hand."""
        ...

    def compose(self, trees: Sequence[ProposalTree], root: int) -> ProposalTree: ...

    def observe(self, context: Context, step: Step, arrived: Sequence[Arrived]) -> None:
        """What a step came to, already in the context, and answers that came since the last one."""
        ...

    def explain(self) -> Mapping[str, Any] | None:
        """What the step at hand does and why; None where nobody wants to know."""
        ...


class Fixed:
    """Everyone is asked for the same, and what they say is composed in one way."""

    begins_asking = True
    looks = True

    def __init__(self, compose: Compose, ask: Ask, tells_all: bool = False) -> None:
        """Args: tells_all: the features of every position are wanted, as they come."""
        self.ask = ask
        self._compose = compose
        self._tells_all = tells_all

    def likely(self, names: Sequence[str]) -> Sequence[str]:
        return names

    def plan(self, context: Context, idle: Sequence[Candidate], free: Sequence[ProposalTree]) -> Plan:
        return Plan({drafter: Question(self.ask) for drafter in idle}, tells_all=self._tells_all)

    def compose(self, trees: Sequence[ProposalTree], root: int) -> ProposalTree:
        return self._compose(trees, root, self.ask.num_nodes)

    def observe(self, context: Context, step: Step, arrived: Sequence[Arrived]) -> None:
        pass

    def explain(self) -> Mapping[str, Any] | None:
        return None
