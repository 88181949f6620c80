"""Acceptance: the walk down the tree along what the target decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from taps.composing import concatenated
from taps.engine.verification import Acceptance, Asked, Ending, accept, accept_all
from taps.tree import ProposalTree
from tests.fakes import chain, random_tree


def says(*tokens: int) -> Callable[[int, Sequence[int]], int]:
    """A target that decides these tokens, whatever is drafted."""
    return lambda _, accepted: tokens[len(accepted)]


def branching() -> ProposalTree:
    """5 -> (7, 8 -> 9), 6 -> 7, all below root 0."""
    nodes = [
        (5, 0, -0.1, 1),
        (6, 0, -0.2, 2),
        (7, 1, -0.3, 1),
        (8, 1, -0.4, 3),
        (7, 2, -0.5, 2),
        (9, 4, -0.6, 1),
    ]
    return ProposalTree.ordered(0, nodes, 7)


def test_rejecting_every_node_still_yields_the_bonus_token() -> None:
    assert accept(branching(), says(3)) == ((0,), (3,), ())


def test_a_tree_of_the_root_alone_is_plain_decoding() -> None:
    assert accept(ProposalTree.root_only(4), says(2)) == ((0,), (2,), ())


def test_full_acceptance_adds_the_bonus_after_the_leaf() -> None:
    assert accept(chain(5, 6, 7), says(5, 6, 7, 8)) == ((0, 1, 2, 3), (5, 6, 7, 8), (1, 1, 1))


def test_the_walk_follows_the_branch_the_target_decides() -> None:
    assert accept(branching(), says(5, 8, 9, 2)) == ((0, 1, 4, 6), (5, 8, 9, 2), (1, 3, 1))
    assert accept(branching(), says(5, 7, 2)) == ((0, 1, 3), (5, 7, 2), (1, 1))


def test_a_token_drafted_elsewhere_in_the_tree_is_not_accepted() -> None:
    assert accept(branching(), says(6, 8)) == ((0, 2), (6, 8), (2,))


def test_the_target_is_asked_on_walked_nodes_only_with_the_tokens_on_the_way() -> None:
    asked: list[tuple[int, tuple[int, ...]]] = []

    def decide(node: int, accepted: Sequence[int]) -> int:
        asked.append((node, tuple(accepted)))
        return (5, 8, 3)[len(accepted)]

    accept(branching(), decide)
    assert asked == [(0, ()), (1, (5,)), (4, (5, 8))]


def test_duplicates_are_walked_as_one_and_both_drafters_own_them() -> None:
    first = chain(5, 6).owned_by(0)
    second = chain(5, 7, 8).owned_by(1)
    outcome = accept(concatenated([first, second], root=0), says(5, 7, 8, 2))
    assert outcome.tokens == (5, 7, 8, 2)
    assert outcome.owners == (0b11, 0b10, 0b10)


@pytest.mark.parametrize("seed", range(30))
def test_the_kept_path_is_a_chain_of_the_tree_that_spells_the_accepted_tokens(seed: int) -> None:
    rng = random.Random(seed)
    trees = [random_tree(rng, num_nodes=20, vocab_size=2) for _ in range(rng.randrange(1, 4))]
    tree = concatenated(trees, root=0)
    path, tokens, owners = accept(tree, lambda _, accepted: random.Random(f"{seed} {accepted}").randrange(2))
    assert path == tree.path(path[-1])
    assert tree.token_path(path[-1]) == tokens[:-1]
    assert len(owners) == len(tokens) - 1
    paths = {tree.token_path(node) for node in range(len(tree))}
    assert tokens not in paths, "a drafted token was taken for the bonus"


def says_at_random(seed: int, tree: int, _: int, tokens: Sequence[int]) -> int:
    return random.Random(f"{seed} {tree} {list(tokens)}").randrange(2)


@pytest.mark.parametrize("seed", range(30))
def test_trees_walked_together_end_as_each_would_alone(seed: int) -> None:
    rng = random.Random(seed)
    trees = [
        concatenated([random_tree(rng, num_nodes=15, vocab_size=2) for _ in range(rng.randrange(1, 3))], root=0)
        for _ in range(rng.randrange(5))
    ]
    together = accept_all(trees, lambda asked: [says_at_random(seed, *one) for one in asked])
    for index, tree in enumerate(trees):
        assert together[index] == accept(tree, partial(says_at_random, seed, index))


def test_a_level_of_all_trees_is_one_question_and_ended_trees_are_asked_no_more() -> None:
    levels: list[list[Asked]] = []

    def decide(asked: Sequence[Asked]) -> list[int]:
        levels.append(list(asked))
        return [5] * len(asked)

    accept_all([chain(5, 5), ProposalTree.root_only(1), chain(7), chain(5)], decide)
    assert levels == [
        [(0, 0, ()), (1, 0, ()), (2, 0, ()), (3, 0, ())],
        [(0, 1, (5,)), (3, 1, (5,))],
        [(0, 2, (5, 5))],
    ]


def test_an_exception_is_the_outcome_of_its_tree_alone() -> None:
    lost = ArithmeticError("no number")

    def decide(asked: Sequence[Asked]) -> list[int | Exception]:
        return [lost if one.tree == 1 and one.node == 1 else 5 for one in asked]

    first, failed, last = accept_all([chain(5), chain(5, 5), chain(5, 5, 5)], decide)
    assert failed is lost
    assert first == Acceptance((0, 1), (5, 5), (1,))
    assert last == Acceptance((0, 1, 2, 3), (5, 5, 5, 5), (1, 1, 1))


def test_a_walk_ends_at_an_end_token_or_limit_although_more_was_drafted() -> None:
    tree = chain(5, 6, 7, 8)
    tokens = [5, 6, 7, 8, 9]

    def walked(ending: Ending) -> Acceptance | Exception:
        (outcome,) = accept_all([tree], lambda asked: [tokens[len(one.tokens)] for one in asked], [ending])
        return outcome

    assert walked(Ending()) == Acceptance((0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (1, 1, 1, 1))
    assert walked(Ending((7,))) == Acceptance((0, 1, 2), (5, 6, 7), (1, 1, 1)), "the last token is not cached"
    assert walked(Ending((9,))) == walked(Ending())
    assert walked(Ending(num_left=1)) == Acceptance((0,), (5,), (1,))
    assert walked(Ending(num_left=4)) == Acceptance((0, 1, 2, 3), (5, 6, 7, 8), (1, 1, 1, 1))
