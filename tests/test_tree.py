"""The proposal tree: order, prefixes, derived structure, checks and the wire."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from taps.tree import NO_PARENT, ROOT, InvalidTree, ProposalTree
from tests.fakes import chain, random_tree

RANDOM_TREES = [random_tree(random.Random(seed), num_nodes=12) for seed in range(20)]

#      0
#    / | \
#   1  2  4      (5, 6 and 7 are the tokens below the root, 8 and 9 those at depth two)
#   |  |
#   3  5
TREE = ProposalTree(
    (1, 5, 6, 8, 7, 9), (-1, 0, 0, 1, 0, 2), (0.0, -0.1, -0.2, -0.4, -0.5, -0.9), (0, 1, 2, 1, 3, 2)
)


def test_ordered_puts_the_best_scores_first_and_keeps_parents() -> None:
    nodes = [(6, 0, -0.2, 2), (5, 0, -0.1, 1), (9, 1, -0.9, 2), (8, 2, -0.4, 1), (7, 0, -0.5, 3)]
    assert ProposalTree.ordered(1, nodes, 6) == TREE


def test_equal_scores_are_ordered_by_depth_then_index() -> None:
    nodes = [(5, 0, -1.0, 1), (6, 1, -1.0, 1), (7, 0, -1.0, 1), (8, 0, -1.0, 1)]
    assert ProposalTree.ordered(0, nodes, 5).tokens == (0, 5, 7, 8, 6)


def test_a_child_scored_above_its_parent_is_clamped_to_it() -> None:
    tree = ProposalTree.ordered(0, [(5, 0, -2.0, 1), (6, 1, -0.5, 1), (7, 2, -1.0, 1)], 4)
    assert tree.scores == (0.0, -2.0, -2.0, -2.0)
    assert tree.tokens == (0, 5, 6, 7)
    assert tree.check() is tree


def test_a_draft_scored_above_certainty_is_clamped_to_the_root() -> None:
    assert ProposalTree.ordered(0, [(5, 0, 3.0, 1)], 2).scores == (0.0, 0.0)


@pytest.mark.parametrize("num_nodes", [-1, 0, 1])
def test_the_root_is_kept_whatever_the_budget(num_nodes: int) -> None:
    assert ProposalTree.ordered(4, [(5, 0, -1.0, 1)], num_nodes) == ProposalTree.root_only(4)
    assert TREE.prefix(num_nodes) == ProposalTree.root_only(1)


@pytest.mark.parametrize("tree", RANDOM_TREES)
def test_every_prefix_of_an_ordered_tree_is_a_tree(tree: ProposalTree) -> None:
    for n in range(1, len(tree) + 1):
        prefix = tree.prefix(n)
        assert len(prefix.check()) == n
        assert [prefix.token_path(i) for i in range(n)] == [tree.token_path(i) for i in range(n)]
    assert tree.prefix(len(tree) + 5) is tree


def test_a_budgeted_tree_is_the_prefix_of_the_whole_one() -> None:
    rng = random.Random(0)
    nodes = [(rng.randrange(4), rng.randrange(i + 1), -rng.random(), 1) for i in range(15)]
    whole = ProposalTree.ordered(0, nodes, 16)
    assert [ProposalTree.ordered(0, nodes, n) for n in range(1, 17)] == [whole.prefix(n) for n in range(1, 17)]


def test_structure_of_a_known_tree() -> None:
    assert TREE.depths == (0, 1, 1, 2, 1, 2)
    assert TREE.children == ((1, 2, 4), (3,), (5,), (), (), ())
    assert [TREE.path(i) for i in range(6)] == [(0,), (0, 1), (0, 2), (0, 1, 3), (0, 4), (0, 2, 5)]
    assert TREE.token_path(5) == (6, 9)
    assert TREE.token_path(ROOT) == ()
    assert TREE.ancestry.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("tree", RANDOM_TREES)
def test_depths_paths_ancestry_and_children_agree(tree: ProposalTree) -> None:
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[0] == ROOT
        assert path[-1] == node
        assert len(path) == tree.depths[node] + 1
        assert all(child in tree.children[parent] for parent, child in pairwise(path))
        assert tree.ancestry[node].nonzero().flatten().tolist() == sorted(path)
    assert sum(map(len, tree.children)) == len(tree) - 1


def test_only_chains_are_chains() -> None:
    assert chain(5, 6, 7).is_chain
    assert ProposalTree.root_only(3).is_chain
    assert not TREE.is_chain


def test_owned_by_marks_every_drafted_node_and_nothing_else() -> None:
    owned = TREE.owned_by(2)
    assert owned.owners == (0, 4, 4, 4, 4, 4)
    assert dataclasses.replace(owned, owners=TREE.owners) == TREE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": (), "parents": (), "scores": (), "owners": ()}, "at least one"),
        ({"owners": (0, 1)}, "equally many"),
        ({"scores": (0.0,) * 5}, "equally many"),
        ({"parents": (0, 0, 0, 1, 0, 2)}, "parent -1"),
        ({"parents": (-1, 0, 2, 1, 0, 2)}, "node 2 has parent 2"),
        ({"parents": (-1, 0, 0, 5, 0, 2)}, "node 3 has parent 5"),
        ({"parents": (-1, NO_PARENT, 0, 1, 0, 2)}, "node 1 has parent -1"),
        ({"scores": (0.0, -0.2, -0.1, -0.4, -0.5, -0.9)}, "must not increase"),
        ({"scores": (-0.1, -0.1, -0.2, -0.4, -0.5, -0.9)}, "root has score -0.1"),
        ({"entropies": (0.5, 0.1, float("nan"), 0.0, 0.0, 0.0)}, "finite entropy"),
        ({"entropies": (0.5,)}, "each of its 6 nodes"),
        ({"scores": (0.0, 0.1, -0.2, -0.4, -0.5, -0.9)}, "node 1 has score"),
        ({"scores": (0.0, -0.1, float("nan"), -0.4, -0.5, -0.9)}, "node 2 has score nan"),
    ],
)
def test_check_says_what_is_wrong(change: dict[str, float | tuple[float, ...]], reason: str) -> None:
    broken = replace(TREE)
    for name, value in change.items():
        object.__setattr__(broken, name, value)
    with pytest.raises(InvalidTree, match=reason):
        broken.check()
