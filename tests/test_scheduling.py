"""Scheduling: what of the waiting trees and prompts goes into one step, and what a row costs."""

from __future__ import annotations

import math
import random

import pytest

from taps.engine.scheduling import Pace, share_nodes, share_prefill
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


def test_as_many_rows_fit_a_time_as_measured_steps_say() -> None:
    pace, rng = Pace(), random.Random(0)
    assert pace.rows_within(0.001) > 10**6, "nothing is known"
    for _ in range(200):
        rows = rng.randrange(1, 300)
        pace.observe(rows, 0.010 + 0.0005 * rows)
    assert pace.rows_within(0.010 + 0.0005 * 80) == pytest.approx(80, abs=2)
    assert pace.rows_within(0.001) == 0
    assert pace.rows_within(math.inf) == 1 << 30


def test_steps_of_one_size_are_taken_to_cost_by_the_row_and_the_newest_count_most() -> None:
    pace = Pace()
    for seconds in (0.1, 0.02):
        for _ in range(200):
            pace.observe(16, seconds)
    assert pace.rows_within(0.04) == pytest.approx(32, abs=1)
