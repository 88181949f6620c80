"""Growth: the best nodes of the newest level are extended, and the best of all are kept."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from taps.drafting.drafter import Ask
from taps.drafting.growth import Frontier, Growth
from taps.tree import ProposalTree
from tests.plain_growth import PlainGrowth

VOCAB = 6
Path = tuple[int, ...]


class Drawn(NamedTuple):
    """The candidates below a node, best first, and the entropy they come with."""

    tokens: list[int]
    logprobs: list[float]
    entropy: float


class Distributions:
    """A function of the path: of one of several kinds, with ties, impossible tokens and certain ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kind = random.Random(seed).choice(["smooth", "tied", "certain", "impossible", "broken"])

    def below(self, path: Path, top_k: int) -> Drawn:
        dice = random.Random(f"{self._seed} {path}")
        logprobs = [self._logprob(dice) for _ in range(VOCAB)]
        logprobs.sort(key=lambda p: -math.inf if math.isnan(p) else p, reverse=True)
        return Drawn(dice.sample(range(VOCAB), VOCAB)[:top_k], logprobs[:top_k], dice.random())

    def _logprob(self, dice: random.Random) -> float:
        match self._kind:
            case "smooth":
                return -dice.expovariate(1.0)
            case "tied":
                return -0.5 * dice.randrange(3)
            case "certain":
                return 0.0
            case "impossible":
                return dice.choice([-0.25, -1.0, -math.inf])
            case _:
                return dice.choice([-0.25, math.nan])


class Grown(NamedTuple):
    trees: list[ProposalTree]
    num_rows: list[int]  # extended in each tree, its root included


def grow(asks: Sequence[Ask], distributions: Sequence[Distributions]) -> Grown:
    """All at once."""
    growth = Growth(range(len(asks)), asks)
    most = min(VOCAB, max(ask.top_k for ask in asks))
    paths: list[list[Path]] = [[()] for _ in asks]
    num_rows = [1] * len(asks)
    while True:
        found = [
            source.below(path, ask.top_k)
            for ask, source, of_tree in zip(asks, distributions, paths, strict=True)
            for path in of_tree
        ]
        tokens = torch.tensor([d.tokens + [0] * (most - len(d.tokens)) for d in found])
        logprobs = torch.tensor(
            [d.logprobs + [-math.inf] * (most - len(d.logprobs)) for d in found], dtype=torch.double
        )
        entropies = torch.tensor([d.entropy for d in found], dtype=torch.double)
        frontier = growth.extend(tokens, logprobs, entropies)
        if frontier is None:
            return Grown(growth.trees(), num_rows)
        paths = below(frontier, [path for of_tree in paths for path in of_tree])
        num_rows = [n + len(of_tree) for n, of_tree in zip(num_rows, paths, strict=True)]


def below(frontier: Frontier, before: Sequence[Path]) -> list[list[Path]]:
    """The token path of every frontier node, tree by tree."""
    parents, tokens = frontier.parents, frontier.tokens
    rows = iter([(*before[parent], token) for parent, token in zip(parents, tokens, strict=True)])
    return [[next(rows) for _ in of_tree] for of_tree in frontier.paths]


def grow_plainly(root: int, ask: Ask, distributions: Distributions) -> tuple[ProposalTree, int]:
    """One, and how many of its nodes were extended."""
    growth = PlainGrowth(root, ask)
    paths: dict[int, Path] = {0: ()}
    num_rows = 0
    while growth.frontier:
        frontier = growth.frontier
        found = [distributions.below(paths[node], ask.top_k) for node in frontier]
        num_rows += len(frontier)
        growth.extend([d.tokens for d in found], [d.logprobs for d in found], [d.entropy for d in found])
        for node in growth.frontier:
            paths[node] = (*paths[growth.parent(node)], growth.token(node))
    return growth.tree(), num_rows


def drawn_ask(rng: random.Random) -> Ask:
    return Ask(
        rng.choice([1, 2, 3, 5, 8, 16, 10_000]), depth=rng.randrange(5), top_k=rng.randrange(1, VOCAB + 3)
    )


def inner_entropies(tree: ProposalTree) -> list[float]:
    return [tree.entropies[node] for node in tree.inner]


@pytest.mark.parametrize("seed", range(300))
def test_trees_grown_together_are_those_grown_node_by_node(seed: int) -> None:
    rng = random.Random(seed)
    asks = [drawn_ask(rng) for _ in range(rng.choice([1, 2, 5]))]
    distributions = [Distributions(100 * seed + i) for i in range(len(asks))]
    together = grow(asks, distributions)
    for root, (ask, tree) in enumerate(zip(asks, together.trees, strict=True)):
        plain, num_rows = grow_plainly(root, ask, distributions[root])
        assert replace(tree.check(), entropies=()) == replace(plain, entropies=())
        assert inner_entropies(tree) == inner_entropies(plain)
        assert together.num_rows[root] <= num_rows


@pytest.mark.parametrize("seed", range(100))
def test_a_tree_that_ends_early_is_the_whole_one(seed: int) -> None:
    """The whole one has room for every node."""
    rng = random.Random(seed)
    ask, distributions = replace(drawn_ask(rng), num_nodes=rng.randrange(1, 12)), Distributions(seed)
    (whole,), _ = grow([replace(ask, num_nodes=10_000)], [distributions])
    (early,), _ = grow([ask], [distributions])
    prefix = whole.prefix(ask.num_nodes)
    assert early.entropy == prefix.entropy
    assert replace(early, entropies=()) == replace(prefix, entropies=())


@pytest.mark.parametrize("seed", range(10))
def test_an_ask_bounds_nodes_depth_and_children(seed: int) -> None:
    ask = drawn_ask(random.Random(seed))
    (tree,), (num_rows,) = grow([ask], [Distributions(seed)])
    assert len(tree) <= ask.num_nodes
    assert max(tree.depths) <= ask.depth + 1
    assert max(map(len, tree.children)) <= ask.top_k
    assert num_rows <= 1 + ask.depth * ask.top_k


def extend(
    growth: Growth, tokens: list[list[int]], logprobs: list[list[float]], entropies: list[float]
) -> Frontier | None:
    return growth.extend(
        torch.tensor(tokens), torch.tensor(logprobs, dtype=torch.double), torch.tensor(entropies).double()
    )


def test_the_frontier_is_the_best_of_the_newest_level_only() -> None:
    """Two levels below root 9, worked by hand."""
    growth = Growth([9], [Ask(num_nodes=5, depth=2, top_k=2)])
    first = extend(growth, [[5, 6]], [[-0.1, -1.0]], [0.4])
    assert first is not None
    assert first.paths == [[[0], [1]]]
    assert [first.tokens, first.parents] == [[5, 6], [0, 0]]
    second = extend(growth, [[7, 8], [3, 4]], [[-0.5, -2.0], [-0.05, -0.3]], [0.2, 0.6])
    assert second is not None
    # Token 3 at -1.05 is the last of a full tree: what is below it comes behind.
    assert second.paths == [[[0, 2]]]
    assert [second.tokens, second.parents] == [[7], [0]]
    assert extend(growth, [[1, 2]], [[-1.0, -1.0]], [0.1]) is None
    (tree,) = growth.trees()
    assert tree.tokens == (9, 5, 7, 6, 3)
    assert tree.parents == (-1, 0, 1, 0, 3)
    assert tree.scores == pytest.approx((0.0, -0.1, -0.6, -1.0, -1.05))
    assert tree.entropies == pytest.approx((0.4, 0.2, 0.1, 0.6, 0.0))
    assert tree.entropy == pytest.approx(0.4)
    assert tree.prefix(3).entropy == pytest.approx(0.3), "nothing comes from the other node of the first level"


def test_a_node_below_which_nothing_could_enter_is_not_extended() -> None:
    """By hand, two trees: one is grown after its second level, the other goes on below one of its nodes."""
    growth = Growth([9, 8], [Ask(num_nodes=3, depth=4, top_k=2)] * 2)
    first = extend(growth, [[5, 6], [5, 6]], [[-0.5, -0.9], [-0.25, -2.0]], [0.4, 0.4])
    assert first is not None
    assert first.paths == [[[0]], [[0]]], "the other node is the last of a full tree already"
    second = extend(growth, [[7, 8], [3, 4]], [[-1.0, -2.0], [-0.5, -3.0]], [0.2, 0.6])
    assert second is None, "the best below are at -1.5, and at -0.75: the last of a full tree"
    assert [tree.tokens for tree in growth.trees()] == [(9, 5, 6), (8, 5, 3)]


def test_a_tree_does_not_wait_for_those_that_are_shallower() -> None:
    growth = Growth([9, 8], [Ask(num_nodes=9, depth=0, top_k=1), Ask(num_nodes=9, depth=1, top_k=2)])
    frontier = extend(growth, [[5, 0], [5, 6]], [[-0.5, -math.inf], [-0.5, -0.9]], [0.4, 0.4])
    assert frontier is not None
    assert frontier.paths == [[], [[0], [1]]]
    assert frontier.parents == [1, 1]
    assert extend(growth, [[1, 2], [3, 4]], [[-1.0, -math.inf]] * 2, [0.1, 0.2]) is None
    assert [tree.tokens for tree in growth.trees()] == [(9, 5), (8, 5, 6, 1, 3)]


def test_every_frontier_node_needs_its_candidates() -> None:
    growth = Growth([9], [Ask()])
    with pytest.raises(ValueError, match="shape"):
        extend(growth, [[1], [2]], [[-0.1], [-0.1]], [0.0, 0.0])


def test_children_that_cannot_be_sampled_are_not_drafted() -> None:
    growth = Growth([9], [Ask(num_nodes=10, depth=1, top_k=3)])
    extend(growth, [[5, 6, 7]], [[-0.1, -math.inf, -math.inf]], [0.0])
    extend(growth, [[1, 2, 3]], [[-0.2, -0.3, -math.inf]], [0.0])
    assert growth.trees()[0].tokens == (9, 5, 1, 2)
