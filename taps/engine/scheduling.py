"""What goes into the next step of the target: chunks of prefill, and how much of each tree.

Pure functions of the waiting work; knows lengths and scores, nothing of tensors or of who waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from taps.tree import ProposalTree

MAX_SESSIONS, MAX_LEN = 16, 2048  # by default: sessions of a target, and positions of each
_LEAST_GAIN = 1.02  # in tokens a second, by what is drafted: what costs do not tell takes about that much


@dataclass(frozen=True)
class StepBudget:
    """Bounds of one step: they keep it short whoever is waiting."""

    prefill_tokens: int = 256  # prompt tokens, over all sessions
    tree_nodes: int = 32  # drafted nodes, over all sessions, roots not counted
    # Beside trees fewer prompt tokens are taken where the step would last longer, as far as was measured.
    longest_step_s: float = 0.1
    least_prefill_tokens: int = 32  # that are taken however long it lasts


def share_nodes(
    trees: Sequence[ProposalTree], tree_nodes: int, cost: Callable[[int], float] | None = None
) -> list[ProposalTree]:
    """Keep at most `tree_nodes` drafted nodes, those with the best path probability over all trees.

    Of calibrated trees no more are kept than raise the tokens expected per second over all sessions, which may
    be none; of the others all that the budget allows. Scores do not increase along a tree, so what is kept of
    each is a prefix. Args: cost: seconds until every session's next verdict, by the nodes drafted in the step.
    """
    drafted = [(-tree.scores[i], i, t) for t, tree in enumerate(trees) for i in range(1, len(tree))]
    free = sum(trees[t].calibrated for _, _, t in drafted) if cost is not None else 0
    if len(drafted) <= tree_nodes and not free:
        return list(trees)
    best = sorted(drafted)[: max(tree_nodes, 0)]
    if cost is not None and free:
        best = _worth_it(best, trees, cost)
    kept = [1] * len(trees)
    for _, _, t in best:
        kept[t] += 1
    return [tree.prefix(n) for tree, n in zip(trees, kept, strict=True)]


_Drafted: TypeAlias = tuple[float, int, int]  # negative score, node, tree


def _worth_it(
    best: Sequence[_Drafted], trees: Sequence[ProposalTree], cost: Callable[[int], float]
) -> list[_Drafted]:
    """All nodes of trees that are not calibrated; of the others as many as give the most tokens a second, none
    where that is hardly more than without them.
    """
    asked = [node for node in best if not trees[node[2]].calibrated]
    offered = [node for node in best if trees[node[2]].calibrated]
    tokens = len(trees) + sum(math.exp(-surprisal) for surprisal, _, _ in asked)
    count, goodput = 0, _LEAST_GAIN * tokens / cost(len(asked))
    for number, (surprisal, _, _) in enumerate(offered, 1):
        tokens += math.exp(-surprisal)
        if (reached := tokens / cost(len(asked) + number)) > goodput:
            count, goodput = number, reached
    return [*asked, *offered[:count]]


def share_prefill(remaining: Sequence[int], prefill_tokens: int) -> list[int]:
    """How many of each prompt's `remaining` tokens to take: first come, first served."""
    taken = []
    for tokens in remaining:
        taken.append(min(tokens, prefill_tokens))
        prefill_tokens -= taken[-1]
    return taken
