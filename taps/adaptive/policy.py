"""The adaptive strategy of one session, and what all sessions of a router learn together.

Before a step: what nodes at hand are worth, who is asked for how much if that pays, and who is asked aside, to
be learned from. After it: every tree, chosen or not, is compared with the text once that has passed its depth
(full information: HedgeSpec, arXiv 2510.20064).

Knows drafters by name, trees and texts; nothing of who decodes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from taps.adaptive.calibration import Calibration
from taps.adaptive.gains import Gains
from taps.adaptive.judging import Judge
from taps.adaptive.planning import Choice, Drafted, Planner
from taps.composing.merging import union
from taps.context import Context
from taps.decoding.policy import Arrived, Candidate, Offer, Plan, Question, Step
from taps.drafting.drafter import Ask
from taps.tree import ProposalTree

_FIRST_PROBE, _LONGEST_PROBE = 6, 256  # tokens until a drafter who is not asked is asked aside
_PROMISING = 0.8  # of the best one's gain, that keeps a drafter probed often
_PROBE_DEPTH = 5  # tokens of a path
_REST = 8  # tokens of plain decoding that one look is for, at most: every look costs all sessions
_FEW = 16  # tokens that a drafter takes in beside drafting; more of them last longer


@dataclass
class Fleet:
    """What all sessions learned: of each drafter, in each way to sample."""

    planner: Planner = field(default_factory=Planner)
    gains: dict[tuple[str, str], Gains] = field(default_factory=dict)
    calibrations: dict[tuple[str, str], Calibration] = field(default_factory=dict)
    probes: Counter[str] = field(default_factory=Counter)  # by drafter


@dataclass
class _Known:
    """Of one drafter in this session."""

    gains: Gains
    judge: Judge
    next_probe: int  # tokens decided by then
    interval: int = _FIRST_PROBE
    is_sent_for: bool = False  # to be asked aside once it is there


class _Judged(NamedTuple):
    """A tree that is compared with the text once that has passed it."""

    name: str
    is_at_hand: bool
    depth: int  # tokens of its longest path that were asked for
    end: int  # tokens decided when it was grown
    tree: ProposalTree


class Adaptive:
    """Implements `taps.decoding.policy.Policy`. `close` it with its session."""

    def __init__(self, fleet: Fleet, names: Sequence[str], ask: Ask, explains: bool = False) -> None:
        """Args: names: of the drafters, by index; ask: the largest tree, and what drafts are coupled to."""
        self.ask = ask
        self.begins_asking = True
        self._names = names
        self._fleet, self._planner = fleet, fleet.planner
        self._explains = explains
        self._way = "greedy" if ask.sampling is None or ask.sampling.greedy else "coupled"
        self._known: dict[str, _Known] = {}
        self._waiting: list[_Judged] = []  # for the text to pass them
        self._choice = Choice((), 0, 0.0)
        self._offered = ProposalTree.root_only(0)
        self._probed: list[str] = []
        self._version = 0  # of what is known of the drafters
        self._owed: set[str] = set()  # drafters that are asked
        self._planner.open(self)

    def close(self) -> None:
        """Nothing more comes of this session."""
        for name in self._owed:
            self._planner.answered(name, _PROBE_DEPTH, None)
        self._owed.clear()
        self._planner.close(self)

    def likely(self, names: Sequence[str]) -> Sequence[str]:
        gains = {name: self._of(name, 0).gains.expected for name in names}
        drafters = self._planner.choose(self, gains, 0.0, self._version).drafters
        self.begins_asking = bool(drafters)
        return drafters

    @property
    def looks(self) -> bool:
        return self._planner.looks()

    def plan(self, context: Context, idle: Sequence[Candidate], free: Sequence[ProposalTree]) -> Plan:
        for drafter in idle:  # asked in a plan that was dropped
            if drafter.name in self._owed:
                self._owed.remove(drafter.name)
                self._planner.answered(drafter.name, _PROBE_DEPTH, None)
        at_hand = self._merged(free, context.root) if free else ProposalTree.root_only(context.root)
        free_gain = _expected(at_hand)
        there = {drafter.name: drafter for drafter in idle}
        gains = {name: self._of(name, len(context.tokens)).gains.expected for name in there}
        choice = self._choice = self._planner.choose(self, gains, free_gain, self._version)
        questions = {there[name]: Question(self._asking(choice.depth)) for name in choice.drafters}
        aside = self._probes(context, [there[name] for name in there if name not in choice.drafters])
        questions |= {there[name]: Question(self._asking(_PROBE_DEPTH), False) for name in aside}
        for one in questions:
            if not isinstance(one, Offer):
                self._owed.add(one.name)
                self._planner.asked(one.name)
        comes = any(isinstance(there[name], Offer) for name in choice.drafters)
        is_plain = choice.is_plain or (comes and not free_gain)
        self._offered = ProposalTree.root_only(context.root)
        return Plan(questions, is_plain, rest=0 if questions else min(self._planner.num_sessions - 1, _REST))

    def compose(self, trees: Sequence[ProposalTree], root: int) -> ProposalTree:
        self._offered = self._merged(trees, root)
        return self._offered

    def observe(self, context: Context, step: Step, arrived: Sequence[Arrived]) -> None:
        verdict = step.verdict
        asked_at = len(context.tokens) - len(verdict.tokens)
        for answer in arrived:
            self._take(answer, step.verify_ms / 1e3 if answer.end == asked_at else 0.0)
        if step.is_prefill:
            self._planner.observe_pass(verdict.cost)
        else:
            waited_s = step.verify_ms / 1e3 / verdict.num_passes
            drafted = None
            if len(self._offered) > 1:
                checked = self._offered.prefix(1 + verdict.num_nodes)
                drafted = Drafted(verdict.num_nodes, _expected(checked) / _expected(self._offered))
            else:
                self._planner.observe_plain(verdict.num_passes, verdict.num_nodes, len(verdict.tokens))
            self._planner.observe_step(verdict.cost, waited_s, drafted, len(verdict.tokens))
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if max(one.tree.depths) <= len(context.tokens) - one.end:
                self._learn(one, context)
            else:
                self._waiting.append(one)

    def explain(self) -> Mapping[str, Any] | None:
        if not self._explains:
            return None
        return {
            "asked": list(self._choice.drafters),
            "asked_aside": self._probed,
            "depth": self._choice.depth,
            "expected": round(1.0 + self._choice.gain, 3),
            "offered": [round(math.exp(score), 3) for score in self._offered.scores[1:]],
            **self._planner.explain(self._choice),
        }

    def _asking(self, depth: int) -> Ask:
        return replace(self.ask, depth=depth - 1)

    def _take(self, one: Arrived, ago_s: float) -> None:
        """An answer, there for so long: what it cost, and that it waits for the text to pass it."""
        name, tree = one.drafter.name, one.tree
        if name in self._owed:
            self._owed.remove(name)
            seconds = None if tree is None else one.seconds
            self._planner.answered(name, one.ask.depth + 1, seconds, one.news > _FEW, ago_s)
        if tree is not None and (len(tree) > 1 or not one.drafter.is_at_hand):
            self._waiting.append(_Judged(name, one.drafter.is_at_hand, one.ask.depth + 1, one.end, tree))

    def _of(self, name: str, end: int) -> _Known:
        if name not in self._known:
            key = (name, self._way)
            prior = self._fleet.gains.setdefault(key, Gains())
            calibration = self._fleet.calibrations.setdefault(key, Calibration())
            first = end + _FIRST_PROBE * (1 + len(self._known)) // 2
            self._known[name] = _Known(Gains(prior), Judge(calibration), first)
        return self._known[name]

    def _probes(self, context: Context, others: Sequence[Candidate]) -> list[str]:
        """Who is asked aside now, one at most."""
        end = len(context.tokens)
        due = [one for one in others if self._known[one.name].next_probe <= end]
        self._probed = []

        def turn(one: Candidate) -> tuple[bool, int]:
            """One that was unlucky at first is not forgotten over others that are promising, nor are others
            over one that was sent for and does not come.
            """
            return isinstance(one, Offer) and self._known[one.name].is_sent_for, self._fleet.probes[one.name]

        for one in sorted(due, key=turn):
            known = self._known[one.name]
            if not known.is_sent_for:
                if not self._planner.may_probe():
                    continue
                self._fleet.probes[one.name] += 1
            known.is_sent_for = isinstance(one, Offer)
            known.next_probe = end if known.is_sent_for else end + known.interval
            self._probed = [one.name]
            break
        return self._probed

    def _merged(self, trees: Sequence[ProposalTree], root: int) -> ProposalTree:
        """The union, each path by the best of its calibrated probabilities."""
        scored = [self._known_of(tree).judge.worth(tree) for tree in trees]
        return replace(union(trees, scored, root, self.ask.num_nodes), calibrated=True)

    def _known_of(self, tree: ProposalTree) -> _Known:
        """Of the one drafter that a tree is from."""
        name = self._names[max(tree.owners).bit_length() - 1]
        return self._of(name, 0)

    def _learn(self, one: _Judged, context: Context) -> None:
        """Compare a tree with the text."""
        tree, known = one.tree, self._of(one.name, one.end)
        self._version += 1
        accepted = known.judge.learn(tree, context.tokens[one.end :])
        length = max(depth for depth, right in zip(tree.depths, accepted, strict=True) if right)
        if one.is_at_hand:
            return
        for gains in (known.gains, self._fleet.gains[one.name, self._way]):
            gains.observe(length, one.depth)
        best = max(other.gains.expected(_PROBE_DEPTH) for other in self._known.values())
        promising = known.gains.expected(_PROBE_DEPTH) >= _PROMISING * best
        known.interval = _FIRST_PROBE if promising else min(2 * known.interval, _LONGEST_PROBE)


def _expected(tree: ProposalTree) -> float:
    """Tokens accepted of a calibrated tree."""
    return sum(map(math.exp, tree.scores[1:]))
