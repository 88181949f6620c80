"""What the target decides where a step has logits: tokens along the trees, and how likely these were.

Knows sessions, trees and logits; nothing of models, caches or who shares a step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taps.engine.jobs import TargetSession
from taps.engine.verification import Acceptance, Asked, Ending, accept_all
from taps.sampling import InvalidLogits, Race, sample_rows
from taps.shaping import FindBest, SamplingParams, logprobs_of, shape_rows
from taps.tree import ProposalTree
from taps.verdict import TokenLogprob

_MOST_DRAWN_AHEAD = 16  # rows


class Undecided(NamedTuple):
    """A session's tree, and where its nodes' logits are."""

    session: TargetSession
    tree: ProposalTree
    start: int  # the root's row


def decide(undecided: Sequence[Undecided], logits: Tensor, race: Race | None) -> list[Acceptance | Exception]:
    """What the target decides in each tree: all of them together, level by level. Args: logits [rows, V]."""
    known = _decide_ahead(undecided, logits, race)

    def tokens_after(asked: Sequence[Asked]) -> list[int | InvalidLogits]:
        rows = [undecided[one.tree].start + one.node for one in asked]
        new = [one for one, row in zip(asked, rows, strict=True) if row not in known]
        known.update(_sample(undecided, new, logits, race))
        return [known[row] for row in rows]

    endings = [Ending(one.session.asked.end_tokens, one.session.num_left) for one in undecided]
    return accept_all([one.tree for one in undecided], tokens_after, endings)


def tell(
    undecided: Sequence[Undecided],
    decisions: Sequence[Acceptance | Exception],
    logits: Tensor,
    find_best: FindBest | None = None,
) -> list[tuple[TokenLogprob, ...]]:
    """Log-probabilities of the decided tokens in each tree; none where the session does not ask for them."""
    made = {
        index: decision
        for index, (one, decision) in enumerate(zip(undecided, decisions, strict=True))
        if one.session.asked.num_logprobs is not None and isinstance(decision, Acceptance)
    }
    if not made:
        return [()] * len(undecided)
    asked = [
        Asked(index, node, decision.tokens[:depth])
        for index, decision in made.items()
        for depth, node in enumerate(decision.path)
    ]
    tokens = [token for decision in made.values() for token in decision.tokens]
    numbers = [undecided[one.tree].session.asked.num_logprobs or 0 for one in asked]
    found = iter(logprobs_of(shape_rows(*_places(undecided, asked, logits)), tokens, numbers, find_best))
    told = {index: tuple(TokenLogprob(*next(found)) for _ in one.tokens) for index, one in made.items()}
    return [told.get(index, ()) for index in range(len(undecided))]


def _decide_ahead(
    undecided: Sequence[Undecided], logits: Tensor, race: Race | None
) -> dict[int, int | InvalidLogits]:
    """Tokens by their rows of logits, of whole trees: one operation for all levels.

    Not where they depend on what was accepted before, nor of many rows that are drawn, which cost more.
    """
    free = [index for index, one in enumerate(undecided) if not one.session.looks_back]
    drawn = [index for index in free if not undecided[index].session.asked.sampling.greedy]
    if sum(len(undecided[index].tree) for index in drawn) > _MOST_DRAWN_AHEAD:
        free = [index for index in free if undecided[index].session.asked.sampling.greedy]
    asked = [
        Asked(index, node, tree.tokens[1 : 1 + depth])  # as many as are before it, whichever
        for index, tree in ((index, undecided[index].tree) for index in free)
        for node, depth in enumerate(tree.depths)
    ]
    return _sample(undecided, asked, logits, race)


def _sample(
    undecided: Sequence[Undecided], asked: Sequence[Asked], logits: Tensor, race: Race | None
) -> dict[int, int | InvalidLogits]:
    """The target's tokens after these nodes, by their rows of logits."""
    if not asked:
        return {}
    rows = [undecided[one.tree].start + one.node for one in asked]
    positions = [len(undecided[one.tree].session.tokens) + len(one.tokens) for one in asked]
    chosen, params, counts, excluded = _places(undecided, asked, logits)
    tokens = sample_rows(chosen, params, positions, counts, race, excluded)
    return dict(zip(rows, tokens, strict=True))


def _places(
    undecided: Sequence[Undecided], asked: Sequence[Asked], logits: Tensor
) -> tuple[Tensor, list[SamplingParams], list[Mapping[int, int]], list[Collection[int]]]:
    """What `shape_rows` takes, of the places after these nodes."""
    rows = [undecided[one.tree].start + one.node for one in asked]
    sessions = [undecided[one.tree].session for one in asked]
    every = rows == list(range(len(logits)))
    return (
        logits if every else logits[torch.tensor(rows, device=logits.device)],
        [session.asked.sampling for session in sessions],
        [session.counts(one.tokens) for session, one in zip(sessions, asked, strict=True)],
        [session.excluded(one.tokens) for session, one in zip(sessions, asked, strict=True)],
    )
