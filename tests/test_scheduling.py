"""Scheduling: what of the waiting trees and prompts goes into one step, and what a row costs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest

from taps.engine.scheduling import share_nodes, share_prefill
from taps.tree import ProposalTree
from tests.fakes import chain, random_tree


@pytest.mark.parametrize("seed", range(10))
def test_the_budget_goes_to_the_best_nodes_of_all_trees(seed: int) -> None:
    rng = random.Random(seed)
    trees = [random_tree(rng, num_nodes=rng.randrange(1, 12)) for _ in range(5)]
    total = sum(len(tree) - 1 for tree in trees)
    for budget in range(total + 2):
        kept = share_nodes(trees, budget)
        assert sum(len(tree) - 1 for tree in kept) == min(budget, total)
        assert kept == [tree.prefix(len(share)) for tree, share in zip(trees, kept, strict=True)]
        worst_kept = min((score for share in kept for score in share.scores[1:]), default=0.0)
        dropped = [s for tree, share in zip(trees, kept, strict=True) for s in tree.scores[len(share) :]]
        assert all(score <= worst_kept for score in dropped)


def test_without_budget_every_session_still_gets_its_root() -> None:
    trees = [chain(5, 6), chain(7)]
    assert [len(tree) for tree in share_nodes(trees, 0)] == [1, 1]
    assert [len(tree) for tree in share_nodes(trees, -3)] == [1, 1]
    assert share_nodes([], 8) == []


def test_equal_scores_are_shared_level_by_level_not_session_by_session() -> None:
    trees = [chain(5, 6, 7, score=0.0) for _ in range(3)]
    assert [len(tree) for tree in share_nodes(trees, 6)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("remaining", "budget", "taken"),
    [
        ([5, 5], 20, [5, 5]),
        ([5, 5], 8, [5, 3]),
        ([9, 5, 1], 8, [8, 0, 0]),
        ([0, 5], 3, [0, 3]),
        ([4], 0, [0]),
        ([], 8, []),
    ],
)
def test_prompts_are_prefilled_first_come_first_served(
    remaining: list[int], budget: int, taken: list[int]
) -> None:
    assert share_prefill(remaining, budget) == taken


def calibrated(*probabilities: float) -> ProposalTree:
    """A chain whose nodes are accepted so often."""
    n = len(probabilities) + 1
    scores = (0.0, *map(math.log, probabilities))
    return ProposalTree(tuple(range(n)), tuple(range(-1, n - 1)), scores, (0, *[1] * (n - 1)), calibrated=True)


def test_of_calibrated_trees_as_much_is_kept_as_gives_the_most_tokens_a_second() -> None:
    """Checked against every choice of prefixes."""
    rng = random.Random(4)
    for _ in range(200):
        trees = [
            calibrated(*sorted((rng.random() for _ in range(rng.randrange(5))), reverse=True))
            for _ in range(rng.randrange(1, 4))
        ]
        base, slope = rng.uniform(0.1, 10), rng.uniform(0.01, 3)

        def cost(nodes: int, base: float = base, slope: float = slope) -> float:
            return base + slope * nodes

        def goodput(kept: Sequence[ProposalTree], cost: Callable[[int], float] = cost) -> float:
            gained = sum(math.exp(score) for tree in kept for score in tree.scores[1:])
            return (len(kept) + gained) / cost(sum(len(tree) - 1 for tree in kept))

        every = itertools.product(*([tree.prefix(n + 1) for n in range(len(tree))] for tree in trees))
        best, plain = max(map(goodput, every)), len(trees) / cost(0)
        expected = best if best > 1.02 * plain else plain  # less is lost beside the pass
        assert goodput(share_nodes(trees, 100, cost)) == pytest.approx(expected)


def test_nothing_is_kept_where_nothing_pays_and_what_was_asked_for_is() -> None:
    fixed, free = chain(5, 6, 7), calibrated(0.3, 0.2)
    kept = share_nodes([fixed, free], 100, lambda nodes: 1.0 + 10.0 * nodes)
    assert [len(tree) for tree in kept] == [4, 1]
    assert kept[1].calibrated
    assert [len(tree) for tree in share_nodes([fixed, free], 100, lambda nodes: 1.0)] == [4, 3]


def test_the_budget_holds_whatever_pays() -> None:
    kept = share_nodes([calibrated(0.9, 0.8), calibrated(0.85)], 2, lambda nodes: 1.0)
    assert [len(tree) for tree in kept] == [2, 2]
