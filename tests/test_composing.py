"""Composing: any number of drafters' trees in, one ordered tree out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from taps.composing import STRATEGIES, Compose, concatenated, confidence, entropy, merged, off, single
from taps.composing.merging import expected_entropy
from taps.composing.routing import confidence_score
from taps.engine.verification import accept
from taps.tree import ProposalTree
from tests.fakes import chain, random_tree


def random_trees(seed: int, num_trees: int = 3, num_nodes: int = 10) -> list[ProposalTree]:
    """Trees of few tokens, so that their paths often coincide."""
    rng = random.Random(seed)
    return [random_tree(rng, num_nodes, vocab_size=3).owned_by(drafter) for drafter in range(num_trees)]


def by_path(trees: Sequence[ProposalTree]) -> dict[tuple[int, ...], tuple[float, int]]:
    """Token path -> (best score, owners), over the drafted nodes of all trees."""
    found: dict[tuple[int, ...], tuple[float, int]] = {}
    for tree in trees:
        for node in range(1, len(tree)):
            score, owners = found.get(tree.token_path(node), (-math.inf, 0))
            found[tree.token_path(node)] = max(score, tree.scores[node]), owners | tree.owners[node]
    return found


@pytest.mark.parametrize("compose", [*STRATEGIES.values(), concatenated])
@pytest.mark.parametrize("num_trees", [0, 1, 2, 3])
def test_any_number_of_drafters_gives_a_tree_within_the_budget(compose: Compose, num_trees: int) -> None:
    for seed in range(10):
        for num_nodes in (1, 2, 5, 16):
            trees = random_trees(seed, num_trees)
            tree = compose(trees, 0, num_nodes)
            assert 1 <= len(tree.check()) <= num_nodes
            assert tree.tokens[0] == 0
            assert set(by_path([tree])) <= set(by_path(trees))


@pytest.mark.parametrize("compose", [*STRATEGIES.values(), concatenated])
def test_without_drafters_every_strategy_is_plain_decoding(compose: Compose) -> None:
    assert compose([], 9, 8) == ProposalTree.root_only(9)


@pytest.mark.parametrize("compose", [single, confidence, entropy])
def test_routing_takes_one_drafters_best_nodes_unchanged(compose: Compose) -> None:
    for seed in range(10):
        trees = random_trees(seed)
        assert compose(trees, 0, 6) in [tree.prefix(6) for tree in trees]


@pytest.mark.parametrize("compose", [single, confidence, entropy])
def test_one_drafter_is_taken_whatever_it_says(compose: Compose) -> None:
    (tree,) = random_trees(3, num_trees=1)
    assert compose([tree], 0, 10) == tree


def test_off_proposes_nothing() -> None:
    assert off(random_trees(0), 0, 16) == ProposalTree.root_only(0)


def test_single_takes_the_first_drafter() -> None:
    trees = random_trees(1)
    assert single(trees, 0, 10) == trees[0]


def test_confidence_is_the_mean_path_probability_of_the_drafted_nodes() -> None:
    nodes = [(5, 0, math.log(0.8), 1), (6, 0, math.log(0.1), 1), (7, 1, math.log(0.6), 1)]
    assert confidence_score(ProposalTree.ordered(0, nodes, 4)) == pytest.approx((0.8 + 0.6 + 0.1) / 3)
    assert confidence_score(ProposalTree.root_only(0)) == 0.0


def test_confidence_takes_the_most_confident_and_the_first_of_equals() -> None:
    unsure, sure, as_sure = chain(5, 6, score=-0.9), chain(7, 8, score=-0.2), chain(9, 3, score=-0.2)
    assert confidence([unsure, sure, as_sure], 0, 8) == sure
    assert confidence([as_sure, unsure, sure], 0, 8) == as_sure


def test_confidence_compares_trees_at_equal_size() -> None:
    long = ProposalTree.ordered(0, [(5, 0, -0.1, 1), (6, 1, -5.0, 1), (7, 2, -6.0, 1)], 4)
    short = chain(8, score=-0.5)
    assert confidence([long, short], 0, 4) == long, "a tree is not worse for having more nodes"
    steady = ProposalTree.ordered(0, [(8, 0, -0.5, 1), (6, 1, -0.6, 1), (7, 2, -0.7, 1)], 4)
    assert confidence([long, steady], 0, 4) == steady
    assert confidence([long, steady], 0, 2) == long.prefix(2)


def test_a_drafter_with_nothing_to_say_is_not_routed_to() -> None:
    silent, unsure = ProposalTree.root_only(0), chain(5, score=-9.0)
    assert confidence([silent, unsure], 0, 8) == unsure
    assert entropy([silent, unsure], 0, 8) == unsure


def test_entropy_takes_the_lowest_and_the_first_of_equals() -> None:
    trees = [ProposalTree.ordered(0, [(t, 0, -0.1, 1)], 2, [e, 0.0]) for t, e in [(5, 2.0), (6, 0.5), (7, 0.5)]]
    assert entropy(trees, 0, 8) == trees[1]


@pytest.mark.parametrize("seed", range(30))
def test_merged_is_the_union_of_all_paths_each_once_with_all_its_owners_and_the_best_score(seed: int) -> None:
    trees = random_trees(seed)
    sure = [replace(tree, entropies=()) for tree in trees]
    union = merged(sure, 0, 1 << 30)
    paths = [union.token_path(node) for node in range(1, len(union))]
    assert len(paths) == len(set(paths))
    assert by_path([union]) == by_path(sure)


def test_a_drafter_that_is_unsure_is_discounted_by_its_excess_entropy() -> None:
    sure = replace(chain(5, score=-0.9), entropies=(0.5, 0.0))
    unsure = replace(chain(6, score=-0.2), entropies=(1.5, 0.0))
    union = merged([sure, unsure], 0, 8)
    assert union.tokens == (0, 6, 5)
    assert union.scores == pytest.approx((0.0, -0.7, -0.9)), "by half of the one nat"
    silent = ProposalTree.root_only(0)
    assert merged([silent, unsure], 0, 8) == replace(unsure, entropies=()), "who says nothing is not the surest"


def test_the_expected_entropy_weighs_distributions_by_how_likely_they_are_reached() -> None:
    """Two nats at the root, one after a node of probability 1/4; what a leaf would give does not count."""
    nodes = [(5, 0, math.log(0.25), 1), (6, 1, math.log(0.125), 1)]
    tree = ProposalTree.ordered(0, nodes, 3, [2.0, 1.0, 9.0])
    assert expected_entropy(tree) == pytest.approx((2.0 + 0.25 * 1.0) / 1.25)
    assert tree.entropy == pytest.approx(1.5)
    assert expected_entropy(ProposalTree.root_only(0)) == 0.0


def test_merging_a_tree_with_itself_changes_only_the_owners() -> None:
    tree = chain(5, 6, 7)
    assert merged([tree.owned_by(0), tree.owned_by(1)], 0, 8).owners == (0, 3, 3, 3)
    assert by_path([merged([tree, tree], 0, 8)]) == by_path([tree])


@pytest.mark.parametrize("seed", range(10))
def test_a_merge_on_a_budget_keeps_the_best_of_the_union(seed: int) -> None:
    trees = random_trees(seed)
    union = merged(trees, 0, 1 << 30)
    for num_nodes in range(1, len(union) + 1):
        assert merged(trees, 0, num_nodes) == union.prefix(num_nodes)


def test_a_merged_child_is_never_scored_above_its_parent() -> None:
    liar = ProposalTree((0, 5, 6), (-1, 0, 1), (0.0, -3.0, -1.0), (0, 2, 2))
    assert merged([chain(7), liar], 0, 8).check().scores == (0.0, -0.1, -3.0, -3.0)


def test_concatenated_keeps_duplicates() -> None:
    tree = chain(5, 6)
    assert sorted(concatenated([tree, tree], 0).tokens) == [0, 5, 5, 6, 6]


@pytest.mark.parametrize("seed", range(60))
def test_the_unbudgeted_merge_accepts_exactly_what_the_concatenated_trees_accept(seed: int) -> None:
    trees = random_trees(seed, num_trees=1 + seed % 3, num_nodes=14)

    def target(_: int, accepted: Sequence[int]) -> int:
        return random.Random(f"{seed} {accepted}").randrange(3)

    union, side_by_side = merged(trees, 0, 1 << 30), concatenated(trees, 0)
    ours, theirs = accept(union, target), accept(side_by_side, target)
    assert ours.tokens == theirs.tokens
    assert ours.owners == theirs.owners
    assert union.token_path(ours.path[-1]) == side_by_side.token_path(theirs.path[-1])
