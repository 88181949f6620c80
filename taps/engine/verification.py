"""Acceptance: which drafted tokens the target agrees with. Pure; knows trees, not logits or caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from taps.tree import ROOT, ProposalTree


class Acceptance(NamedTuple):
    """The outcome of one verify pass."""

    path: tuple[int, ...]  # node indices from the root down, root included: what the cache keeps
    tokens: tuple[int, ...]  # the accepted drafted tokens, then the bonus token: never empty
    owners: tuple[int, ...]  # owner bits of each accepted drafted token


class Asked(NamedTuple):
    """The target's own next token is wanted after this node."""

    tree: int  # index among the trees
    node: int
    tokens: tuple[int, ...]  # the drafted tokens accepted on the way there


Decide: TypeAlias = Callable[[Sequence[Asked]], Sequence[int | Exception]]


def accept_all(trees: Sequence[ProposalTree], decide: Decide) -> list[Acceptance | Exception]:
    """Walk down every tree along the tokens the target decides; the first one not drafted is the bonus.

    All trees are walked together, level by level: `decide` is asked once a level, about one node of each
    tree that still goes on. An exception in place of a token is that tree's outcome. Candidates are taken
    as given (q = 1, as EAGLE-2 is released), so this has the same law as sequential rejection. Nodes with
    the same token path (a concatenated merge) are walked as one.
    """
    outcomes: list[Acceptance | Exception | None] = [None] * len(trees)
    walks = {index: _Walk(tree) for index, tree in enumerate(trees)}
    while walks:
        asked = [Asked(index, walk.nodes[0], tuple(walk.tokens)) for index, walk in walks.items()]
        for question, token in zip(asked, decide(asked), strict=True):
            walk = walks[question.tree]
            outcome = token if isinstance(token, Exception) else walk.follow(token)
            if outcome is not None:
                outcomes[question.tree] = outcome
                del walks[question.tree]
    return [outcome for outcome in outcomes if outcome is not None]


def accept(tree: ProposalTree, decide: Callable[[int, Sequence[int]], int]) -> Acceptance:
    """`accept_all` of one tree; `decide(node, tokens)` is the target's token after `node`, or raises."""
    (outcome,) = accept_all([tree], lambda asked: [decide(one.node, one.tokens) for one in asked])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class _Walk:
    """One tree, walked as far as the target's tokens were drafted."""

    def __init__(self, tree: ProposalTree) -> None:
        self.nodes = [ROOT]  # all with the token path walked
        self.tokens: list[int] = []
        self._tree = tree
        self._owners: list[int] = []

    def follow(self, token: int) -> Acceptance | None:
        """Go where the target's token leads; the outcome when it was not drafted."""
        tree = self._tree
        matching = [c for node in self.nodes for c in tree.children[node] if tree.tokens[c] == token]
        self.tokens.append(token)
        if not matching:
            return Acceptance(tree.path(self.nodes[0]), tuple(self.tokens), tuple(self._owners))
        owner = 0
        for node in matching:
            owner |= tree.owners[node]
        self._owners.append(owner)
        self.nodes = matching
        return None
