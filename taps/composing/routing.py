"""Routing: one drafter's tree is taken whole. Knows trees and probabilities; nothing of who drew them.

Every strategy takes `(trees, root, num_nodes)`: trees with the same root token, in the drafters' order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from taps.tree import ProposalTree


def single(trees: Sequence[ProposalTree], root: int, num_nodes: int) -> ProposalTree:
    """The first drafter's tree."""
    return trees[0].prefix(num_nodes) if trees else ProposalTree.root_only(root)


def confidence_score(tree: ProposalTree) -> float:
    """Mean over the drafted nodes of their path probability, exp(cumulative log q) (TAPS, section 3.3)."""
    drafted = tree.scores[1:]
    return sum(map(math.exp, drafted)) / len(drafted) if drafted else 0.0


def confidence(trees: Sequence[ProposalTree], root: int, num_nodes: int) -> ProposalTree:
    """The tree with the highest mean path probability, compared at the size of the smallest that drafted."""
    drafted = [tree.prefix(num_nodes) for tree in trees if len(tree) > 1]
    size = min(map(len, drafted), default=1)
    return max(
        drafted,
        key=lambda tree: confidence_score(tree.prefix(size)),
        default=ProposalTree.root_only(root),
    )


def entropy(trees: Sequence[ProposalTree], root: int, num_nodes: int) -> ProposalTree:
    """The tree whose draft distributions have the lowest mean entropy: the paper's weak baseline."""
    drafted = [tree.prefix(num_nodes) for tree in trees if len(tree) > 1]
    return min(drafted, key=lambda tree: tree.entropy, default=ProposalTree.root_only(root))
