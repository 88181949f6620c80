"""Replay: exact acceptance of any drafter, strategy and tree size from one recorded run of the target.

The target alone decides the text, so a run is recorded once; a drafted token is accepted exactly when the
recorded run has it. Trees are grown once per drafter and position, and shared by everything evaluated.

Knows recordings, trees and strategies; never runs the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, empty

from taps.composing import Compose
from taps.context import ContextDelta
from taps.drafting.drafter import Ask, Drafter, DraftJob
from taps.metrics import SpeculationCounts
from taps.target import Verdict
from taps.training.dataset import Recording
from taps.tree import ProposalTree
from taps.verification import accept


@dataclass(frozen=True)
class Strategy:
    """One row of an evaluation: which drafters, how composed, how many nodes (root included)."""

    name: str
    drafters: tuple[int, ...]
    compose: Compose
    num_nodes: int


class _Trees:
    """One drafter's trees over one recording, grown at the positions that are asked for, in any order."""

    def __init__(self, drafter: Drafter, recording: Recording, ask: Ask, index: int) -> None:
        self._drafter = drafter
        self._tokens: list[int] = recording.tokens.tolist()
        self._features: Tensor = recording.features
        self._ask = ask
        self._index = index
        self._made: dict[int, ProposalTree] = {}

    def grow(self, ends: Sequence[int]) -> None:
        """Grow the trees whose roots are the tokens at `ends` - 1, in increasing order."""
        session = self._drafter.open()
        try:
            known = 0
            for end in ends:
                start = max(known - 1, 0)
                delta = ContextDelta(
                    known, tuple(self._tokens[known:end]), start, self._features[start : end - 1]
                )
                outcome = self._drafter.step([DraftJob(session, delta, self._ask)])[0]
                assert isinstance(outcome, ProposalTree)
                self._made[end] = outcome.owned_by(self._index)
                known = end
        finally:
            self._drafter.close(session)

    def at(self, end: int) -> ProposalTree:
        return self._made[end]


def replay(
    recording: Recording, drafters: Sequence[Drafter], strategies: Sequence[Strategy], ask: Ask,
    progress: Callable[[], None] = lambda: None,
) -> list[SpeculationCounts]:  # fmt: skip
    """Counts of every strategy over one recording, as if each had been decoded live with these drafters.

    Like a live run of greedy decoding whose limit is the recording's length.
    """
    tokens: list[int] = recording.tokens.tolist()
    first = recording.answer_start + 1  # tokens decided after the prefill
    trees = [_Trees(drafter, recording, ask, i) for i, drafter in enumerate(drafters)]
    for grown in trees:
        grown.grow(range(first, len(tokens)))
        progress()
    return [_walk(tokens, first, trees, strategy) for strategy in strategies]


def _walk(tokens: Sequence[int], first: int, trees: Sequence[_Trees], strategy: Strategy) -> SpeculationCounts:
    """Decode along the recording: where the target goes next is known."""
    counts = SpeculationCounts()
    end = first
    while end < len(tokens):
        proposals = [trees[i].at(end) for i in strategy.drafters]
        tree = strategy.compose(proposals, tokens[end - 1], strategy.num_nodes)
        acceptance = accept(tree, _decided(tokens, end))
        delivered = min(len(acceptance.tokens), len(tokens) - end)
        counts.observe(_verdict(tree, acceptance.tokens, acceptance.owners), delivered)
        end += delivered
    return counts


def _decided(tokens: Sequence[int], end: int) -> Callable[[int, Sequence[int]], int]:
    """What the recorded target decides; -1, which no drafter proposes, beyond the recording."""

    def decide(_: int, accepted: Sequence[int]) -> int:
        at = end + len(accepted)
        return tokens[at] if at < len(tokens) else -1

    return decide


def _verdict(tree: ProposalTree, tokens: tuple[int, ...], owners: tuple[int, ...]) -> Verdict:
    return Verdict(tokens, owners, empty(0, 0), len(tree) - 1, max(tree.depths), 1, 0.0, 0.0)
