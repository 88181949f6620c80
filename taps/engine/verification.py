"""Acceptance: which drafted tokens the target agrees with. Pure; knows trees, not logits or caches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple, TypeAlias

from taps.tree import ROOT, ProposalTree


class Acceptance(NamedTuple):
    """The outcome of one verify pass."""

    path: tuple[int, ...]  # node indices from the root down, root included: what the cache keeps
    tokens: tuple[int, ...]  # the accepted drafted tokens, then the bonus token or the text's last: never empty
    owners: tuple[int, ...]  # owner bits of each accepted drafted token


class Asked(NamedTuple):
    """The target's own next token is wanted after this node."""

    tree: int  # index among the trees
    node: int
    tokens: tuple[int, ...]  # the drafted tokens accepted on the way there


class Ending(NamedTuple):
    """Where a walk ends although the tree goes on."""

    tokens: Collection[int] = ()  # after any of these nothing is decided
    num_left: int = 1 << 30  # tokens that may be decided, one at least


Decide: TypeAlias = Callable[[Sequence[Asked]], Sequence[int | Exception]]


def accept_all(
    trees: Sequence[ProposalTree], decide: Decide, endings: Sequence[Ending] | None = None
) -> list[Acceptance | Exception]:
    """Walk down every tree along the tokens the target decides; the first one not drafted is the bonus.

    All trees are walked together, level by level: `decide` is asked once a level, about one node of each
    tree that still goes on. An exception in place of a token is that tree's outcome. Candidates are taken
    as given (q = 1, as EAGLE-2 is released), so this has the same law as sequential rejection. Nodes with
    the same token path (a concatenated merge) are walked as one. A walk ends at its ending, too: its last
    token takes the bonus token's place, drafted or not.
    """
    endings = endings or [Ending()] * len(trees)
    outcomes: list[Acceptance | Exception | None] = [None] * len(trees)
    walks = {index: _Walk(*pair) for index, pair in enumerate(zip(trees, endings, strict=True))}
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

    def __init__(self, tree: ProposalTree, ending: Ending) -> None:
        self.nodes = [ROOT]  # all with the token path walked
        self.tokens: list[int] = []
        self._tree = tree
        self._ending = ending
        self._owners: list[int] = []

    def follow(self, token: int) -> Acceptance | None:
        """Go where the target's token leads; the outcome when it was not drafted, or is the last."""
        tree = self._tree
        matching = [c for node in self.nodes for c in tree.children[node] if tree.tokens[c] == token]
        self.tokens.append(token)
        if matching:
            self._owners.append(reduce(or_, (tree.owners[node] for node in matching)))
        is_last = token in self._ending.tokens or len(self.tokens) >= self._ending.num_left
        if is_last or not matching:
            return Acceptance(tree.path(self.nodes[0]), tuple(self.tokens), tuple(self._owners))
        self.nodes = matching
        return None
