"""Replay: exact acceptance of any drafter, strategy and tree size from one recorded run of the target.

The target alone decides the text, so a run is recorded once; a drafted token is accepted exactly when the
recorded run has it. Trees are grown once per drafter and position, where some strategy comes by, and shared
by all strategies.

Knows recordings, trees and strategies; never runs the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from taps.composing import Compose
from taps.context import ContextDelta
from taps.decoding.metrics import SpeculationCounts, drafters_in
from taps.drafting.drafter import Ask, Drafter, DraftJob
from taps.engine.verification import Acceptance, accept
from taps.recording.shards import Recording
from taps.tree import ProposalTree
from taps.verdict import Verdict


@dataclass(frozen=True)
class Strategy:
    """One row of an evaluation: which drafters, how composed, how many nodes (root included)."""

    name: str
    drafters: tuple[int, ...]
    compose: Compose | None  # None is the oracle: in every step the drafter of whom most is accepted
    num_nodes: int


TreesByEnd = dict[int, ProposalTree]  # number of tokens decided, the root included -> the tree grown there


class Replayed(NamedTuple):
    """What one recording came to."""

    walks: list[Walk]  # one for each strategy
    trees: list[TreesByEnd]  # one for each drafter, at the positions some strategy of it came by


class Walk:
    """One strategy on its way along a recording: where the target goes next is known."""

    def __init__(self, strategy: Strategy, recording: Recording) -> None:
        self.strategy = strategy
        self.counts = SpeculationCounts()
        self.chosen = Counter[int]()  # drafter -> passes whose tree was its alone
        self.end = recording.answer_start + 1  # tokens decided: the prefill decides one
        self._tokens: list[int] = recording.tokens.tolist()

    @property
    def done(self) -> bool:
        return self.end >= len(self._tokens)

    def step(self, proposals: Sequence[ProposalTree]) -> None:
        """One verify pass, of the trees its drafters grew here."""
        compose, num_nodes = self.strategy.compose, self.strategy.num_nodes
        # What the drafters give when they are asked for so many.
        candidates = [tree.prefix(num_nodes) for tree in proposals]
        if compose is not None:
            candidates = [compose(candidates, self._tokens[self.end - 1], num_nodes)]
        accepted = [(tree, accept(tree, self._decided)) for tree in candidates]
        tree, acceptance = max(accepted, key=lambda pair: len(pair[1].tokens))
        self.chosen.update(_sole_owner(tree))
        delivered = min(len(acceptance.tokens), len(self._tokens) - self.end)
        self.counts.observe(_verdict(tree, acceptance), delivered)
        self.end += delivered

    def _decided(self, _: int, accepted: Sequence[int]) -> int:
        """What the recorded target decides; -1, which no drafter proposes, beyond the recording."""
        at = self.end + len(accepted)
        return self._tokens[at] if at < len(self._tokens) else -1


def replay(
    drafters: Sequence[Drafter],
    recordings: Sequence[Recording],
    asks: Sequence[Ask],
    strategies: Sequence[Strategy],
) -> list[Replayed]:
    """Every strategy over every recording, as if each had been decoded live up to its length.

    All recordings advance together, each by the strategy that is furthest behind on it.

    Args: asks: one for each recording.
    """
    walks = [[Walk(strategy, recording) for strategy in strategies] for recording in recordings]
    with ExitStack() as stack:
        growers = [_Grower(drafter, i, recordings, asks, stack) for i, drafter in enumerate(drafters)]
        while behind := {i: at for i, of in enumerate(walks) if (at := _furthest_behind(of))}:
            for grower in growers:
                grower.grow({i: at[0].end for i, at in behind.items() if any(map(grower.serves, at))})
            for i, at in behind.items():
                end = at[0].end
                for walk in at:
                    walk.step([growers[d].trees[i][end] for d in walk.strategy.drafters])
    return [Replayed(of, [grower.trees[i] for grower in growers]) for i, of in enumerate(walks)]


def _furthest_behind(walks: Sequence[Walk]) -> list[Walk]:
    """Of one recording, those that are not done and stand at the earliest position."""
    going = [walk for walk in walks if not walk.done]
    earliest = min((walk.end for walk in going), default=0)
    return [walk for walk in going if walk.end == earliest]


class _Grower:
    """One drafter along all recordings, with a session for each: it grows their trees together."""

    def __init__(
        self, drafter: Drafter, index: int, recordings: Sequence[Recording], asks: Sequence[Ask],
        stack: ExitStack,
    ) -> None:  # fmt: skip
        """Args: index: the drafter's number; stack: closes the sessions."""
        self.trees: list[TreesByEnd] = [{} for _ in recordings]
        self._drafter = drafter
        self._index = index
        self._recordings = recordings
        self._asks = asks
        self._sessions: list[Any] = []
        self._known = [0] * len(recordings)  # tokens the session has been told
        for _ in recordings:
            self._sessions.append(drafter.open())
            stack.callback(drafter.close, self._sessions[-1])

    def serves(self, walk: Walk) -> bool:
        return self._index in walk.strategy.drafters

    def grow(self, ends: Mapping[int, int]) -> None:
        """Grow the trees of some recordings. Args: ends: recording -> tokens decided, more than are known."""
        if not ends:
            return
        jobs = [DraftJob(self._sessions[i], self._delta(i, end), self._asks[i]) for i, end in ends.items()]
        for (i, end), tree in zip(ends.items(), self._drafter.step(jobs), strict=True):
            assert isinstance(tree, ProposalTree)
            self.trees[i][end] = tree.owned_by(self._index)
            self._known[i] = end

    def _delta(self, i: int, end: int) -> ContextDelta:
        recording, known = self._recordings[i], self._known[i]
        start = max(known - 1, 0)
        tokens: list[int] = recording.tokens[known:end].tolist()
        return ContextDelta(known, tuple(tokens), start, recording.features[start : end - 1])


def _sole_owner(tree: ProposalTree) -> list[int]:
    """The drafter that all nodes of the tree come from, if it is one."""
    owners = {drafter for bits in tree.owners[1:] for drafter in drafters_in(bits)}
    return list(owners) if len(owners) == 1 else []


def _verdict(tree: ProposalTree, acceptance: Acceptance) -> Verdict:
    """A verdict without features or times."""
    depth, nothing = max(tree.depths), torch.empty(0, 0)
    return Verdict(acceptance.tokens, acceptance.owners, nothing, len(tree) - 1, depth, 1)
