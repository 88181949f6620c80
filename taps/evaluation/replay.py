"""Replay: exact acceptance of any drafter, strategy and tree size from one recorded run of the target.

The target alone decides the text, so a run is recorded once; a drafted token is accepted exactly when the
recorded run has it. Trees are grown once per drafter and position, and shared by everything evaluated.

Knows recordings, trees and strategies; never runs the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from taps.composing import Compose
from taps.context import ContextDelta
from taps.drafting.drafter import Ask, Drafter, DraftJob
from taps.metrics import SpeculationCounts, drafters_in
from taps.training.shards import Recording
from taps.tree import ProposalTree
from taps.verdict import Verdict
from taps.verification import Acceptance, accept


@dataclass(frozen=True)
class Strategy:
    """One row of an evaluation: which drafters, how composed, how many nodes (root included)."""

    name: str
    drafters: tuple[int, ...]
    compose: Compose | None  # None is the oracle: in every step the drafter of whom most is accepted
    num_nodes: int


class Replayed(NamedTuple):
    """What one strategy came to."""

    counts: SpeculationCounts
    chosen: Counter[int]  # drafter -> passes whose tree was its alone


TreesByEnd = dict[int, ProposalTree]  # number of tokens decided, the root included -> the tree grown there


def grow_trees(
    drafter: Drafter, recordings: Sequence[Recording], asks: Sequence[Ask], index: int
) -> list[TreesByEnd]:
    """The drafter's tree at every position of every recording, as its drafter number `index`.

    Args: asks: one for each recording.
    All recordings advance in step, one session each: the drafter grows their trees together.
    """
    sessions = [drafter.open() for _ in recordings]
    grown: list[TreesByEnd] = [{} for _ in recordings]
    try:
        for step in range(max(len(r.tokens) - r.answer_start for r in recordings)):
            at = [(i, r.answer_start + 1 + step) for i, r in enumerate(recordings)]
            active = [(i, end) for i, end in at if end < len(recordings[i].tokens)]
            if not active:
                break
            jobs = [DraftJob(sessions[i], _delta(recordings[i], end, step), asks[i]) for i, end in active]
            for (i, end), tree in zip(active, drafter.step(jobs), strict=True):
                assert isinstance(tree, ProposalTree)
                grown[i][end] = tree.owned_by(index)
    finally:
        for session in sessions:
            drafter.close(session)
    return grown


def _delta(recording: Recording, end: int, step: int) -> ContextDelta:
    """What a session learns when `end` tokens are decided: everything at first, then one more token."""
    known = end - 1 if step else 0
    start = max(known - 1, 0)
    tokens: list[int] = recording.tokens[known:end].tolist()
    return ContextDelta(known, tuple(tokens), start, recording.features[start : end - 1])


def replay(recording: Recording, trees: Sequence[TreesByEnd], strategies: Sequence[Strategy]) -> list[Replayed]:
    """Every strategy over one recording, as if each had been decoded live up to its length.

    Args: trees: one drafter's trees over this recording, for each drafter.
    """
    return [_walk(recording, trees, strategy) for strategy in strategies]


def _walk(recording: Recording, trees: Sequence[TreesByEnd], strategy: Strategy) -> Replayed:
    """Decode along the recording: where the target goes next is known."""
    counts, chosen = SpeculationCounts(), Counter[int]()
    tokens: list[int] = recording.tokens.tolist()
    end = recording.answer_start + 1  # the prefill decides one token
    while end < len(tokens):
        proposals = [trees[i][end] for i in strategy.drafters]
        if strategy.compose is None:
            candidates = [tree.prefix(strategy.num_nodes) for tree in proposals]
        else:
            candidates = [strategy.compose(proposals, tokens[end - 1], strategy.num_nodes)]
        accepted = [(tree, accept(tree, _decided(tokens, end))) for tree in candidates]
        tree, acceptance = max(accepted, key=lambda pair: len(pair[1].tokens))
        chosen.update(_sole_owner(tree))
        delivered = min(len(acceptance.tokens), len(tokens) - end)
        counts.observe(_verdict(tree, acceptance), delivered)
        end += delivered
    return Replayed(counts, chosen)


def _sole_owner(tree: ProposalTree) -> list[int]:
    """The drafter that all nodes of the tree come from, if it is one."""
    owners = {drafter for bits in tree.owners[1:] for drafter in drafters_in(bits)}
    return list(owners) if len(owners) == 1 else []


def _decided(tokens: Sequence[int], end: int) -> Callable[[int, Sequence[int]], int]:
    """What the recorded target decides; -1, which no drafter proposes, beyond the recording."""

    def decide(_: int, accepted: Sequence[int]) -> int:
        at = end + len(accepted)
        return tokens[at] if at < len(tokens) else -1

    return decide


def _verdict(tree: ProposalTree, acceptance: Acceptance) -> Verdict:
    """A verdict without features or times."""
    depth, nothing = max(tree.depths), torch.empty(0, 0)
    return Verdict(acceptance.tokens, acceptance.owners, nothing, len(tree) - 1, depth, 1, 0.0, 0.0)
