"""Growth: the best nodes of the newest level are extended, and the best of all are kept."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from taps.drafting.drafter import Ask
from taps.drafting.growth import Growth
from taps.tree import ROOT, ProposalTree


def grown() -> Growth:
    """Two levels below root 9, worked by hand: node numbers are 1, 2 and then 3, 4 | 5, 6."""
    growth = Growth(9, Ask(num_nodes=5, depth=2, top_k=2))
    growth.extend([[5, 6]], [[-0.1, -1.0]], [0.4])
    growth.extend([[7, 8], [3, 4]], [[-0.5, -2.0], [-0.05, -0.3]], [0.2, 0.6])
    return growth


def test_growth_begins_at_the_root() -> None:
    growth = Growth(9, Ask())
    assert growth.frontier == [ROOT]
    assert growth.token(ROOT) == 9
    assert growth.tree().tokens == (9,)


def test_the_frontier_is_the_best_of_the_newest_level_only() -> None:
    growth = grown()
    assert growth.frontier == [3, 5]
    assert [growth.token(node) for node in growth.frontier] == [7, 3]
    assert [growth.parent(node) for node in growth.frontier] == [1, 2]


def test_the_tree_is_the_best_nodes_by_path_probability_with_the_entropies_they_come_from() -> None:
    tree = grown().tree()
    assert tree.tokens == (9, 5, 7, 6, 3)
    assert tree.parents == (-1, 0, 1, 0, 3)
    assert tree.scores == pytest.approx((0.0, -0.1, -0.6, -1.0, -1.05))
    assert tree.entropies == (0.4, 0.2, 0.0, 0.6, 0.0)
    assert tree.entropy == pytest.approx(0.4)
    assert tree.prefix(3).entropy == pytest.approx(0.3), "nothing comes from the other node of the first level"


@pytest.mark.parametrize("seed", range(10))
def test_an_ask_bounds_nodes_depth_and_children(seed: int) -> None:
    rng = random.Random(seed)
    ask = Ask(num_nodes=rng.randrange(1, 20), depth=rng.randrange(0, 4), top_k=rng.randrange(1, 5))
    growth = Growth(0, ask)
    levels = 0
    while growth.frontier:
        levels += 1
        rows = [[-rng.random() for _ in range(ask.top_k)] for _ in growth.frontier]
        growth.extend([list(range(ask.top_k)) for _ in rows], rows, [1.0] * len(rows))
        assert len(growth.frontier) <= ask.top_k
    assert levels <= ask.depth + 1
    tree = growth.tree().check()
    assert len(tree) <= ask.num_nodes
    assert max(tree.depths) <= ask.depth + 1
    assert max(map(len, tree.children)) <= ask.top_k


def test_growth_ends_when_nothing_below_could_enter_the_tree() -> None:
    """By hand: two nodes fit, after the second level these are 5 and 6, and the best below is at -1.5."""
    growth = Growth(9, Ask(num_nodes=3, depth=4, top_k=2))
    growth.extend([[5, 6]], [[-0.5, -0.9]], [0.4])
    assert growth.frontier == [1, 2]
    growth.extend([[7, 8], [3, 4]], [[-1.0, -2.0], [-0.8, -3.0]], [0.2, 0.6])
    assert growth.frontier == []
    assert growth.tree().tokens == (9, 5, 6)


@pytest.mark.parametrize("seed", range(200))
def test_a_tree_that_ends_early_is_the_whole_one(seed: int) -> None:
    """The whole one has room for every node. Distributions are a function of the path."""
    rng = random.Random(seed)
    ask = Ask(num_nodes=rng.randrange(1, 12), depth=rng.randrange(0, 5), top_k=rng.randrange(1, 5))
    sharpness = rng.choice([0.0, 0.1, 1.0, 5.0])  # 0: every path is certain, and all tie

    def grow(ask: Ask) -> ProposalTree:
        growth = Growth(0, ask)
        paths: dict[int, tuple[int, ...]] = {ROOT: (seed,)}
        while growth.frontier:
            first = len(paths)
            rows = []
            for node in growth.frontier:
                dice = random.Random(str(paths[node]))
                rows.append(sorted((-sharpness * dice.random() for _ in range(ask.top_k)), reverse=True))
            for node in growth.frontier:
                for child in range(ask.top_k):
                    paths[first] = (*paths[node], child)
                    first += 1
            growth.extend([list(range(ask.top_k)) for _ in rows], rows, [-sum(row) for row in rows])
        return growth.tree()

    whole = grow(Ask(10_000, ask.depth, ask.top_k))
    early, prefix = grow(ask), whole.prefix(ask.num_nodes)
    assert early.entropy == prefix.entropy
    assert replace(early, entropies=()) == replace(prefix, entropies=())


def test_every_frontier_node_needs_its_candidates() -> None:
    growth = Growth(9, Ask())
    with pytest.raises(ValueError, match="shorter"):
        growth.extend([], [[-0.1]], [0.0])


def test_children_that_cannot_be_sampled_are_not_drafted() -> None:
    growth = Growth(9, Ask(num_nodes=10, depth=1, top_k=3))
    growth.extend([[5, 6, 7]], [[-0.1, -math.inf, -math.inf]], [0.0])
    growth.extend([[1, 2, 3]], [[-0.2, -0.3, -math.inf]], [0.0])
    assert growth.tree().tokens == (9, 5, 1, 2)
