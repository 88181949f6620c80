"""Merging: all drafters' trees in one. Knows trees and probabilities; nothing of who drew them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from taps.tree import ROOT, ProposalTree

# Half of it merged a little better than all or none, at 8, 16 and 60 nodes; by less than 1 %.
_DISCOUNT = 0.5


def expected_entropy(tree: ProposalTree) -> float:
    """How unsure its drafter is of the next token where it expects to be, nats; 0 where not known.

    The mean over the nodes with children of their distributions' entropy, by the probability of their paths.
    """
    if not tree.entropies or not tree.inner:
        return 0.0
    reached = {i: math.exp(tree.scores[i]) for i in tree.inner}
    return sum(p * tree.entropies[i] for i, p in reached.items()) / sum(reached.values())


def merged(trees: Sequence[ProposalTree], root: int, num_nodes: int) -> ProposalTree:
    """The best `num_nodes` of the union as a trie, where a node's token path is its identity.

    Drafters that propose the same path give one node that all of them own, with the best of their scores. A
    drafter outside its domain is overconfident in its paths but knows that it is unsure: each tree's scores are
    discounted by half of its expected entropy, as far as that exceeds the surest tree's.
    """
    unsure = [expected_entropy(tree) for tree in trees]
    surest = min((nats for tree, nats in zip(trees, unsure, strict=True) if len(tree) > 1), default=0.0)
    discounts = [_DISCOUNT * (nats - surest) for nats in unsure]
    scored = [
        [(node, tree.scores[node] - discount) for node in range(1, len(tree))]
        for tree, discount in zip(trees, discounts, strict=True)
    ]
    return union(trees, scored, root, num_nodes)


def union(
    trees: Sequence[ProposalTree], scored: Sequence[Sequence[tuple[int, float]]], root: int, num_nodes: int
) -> ProposalTree:
    """The best `num_nodes` of the trees as one trie, each path by the best of its scores.

    Args: scored: of each tree the nodes that are taken, parents first, and their scores.
    """
    place: dict[tuple[int, int], int] = {}  # (merged parent, token) -> merged node
    tokens, parents, scores, owners = [root], [-1], [0.0], [0]
    for tree, nodes in zip(trees, scored, strict=True):
        merged_at = [ROOT] * len(tree)
        for i, score in nodes:
            parent, token = merged_at[tree.parents[i]], tree.tokens[i]
            node = place.setdefault((parent, token), len(tokens))
            merged_at[i] = node
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                scores.append(score)
                owners.append(tree.owners[i])
            else:
                scores[node] = max(scores[node], score)
                owners[node] |= tree.owners[i]
    return ProposalTree.ordered(root, list(zip(tokens, parents, scores, owners, strict=True))[1:], num_nodes)


def concatenated(trees: Sequence[ProposalTree], root: int, num_nodes: int | None = None) -> ProposalTree:
    """The paper's variant (TAPS, section 3.3): trees side by side under the root, duplicates kept.

    `num_nodes` None keeps every node. For the study only: it accepts what the unbudgeted union accepts.
    """
    nodes: list[tuple[int, int, float, int]] = []
    for tree in trees:
        offset = len(nodes)
        for i in range(1, len(tree)):
            parent = tree.parents[i]
            nodes.append((tree.tokens[i], parent and parent + offset, tree.scores[i], tree.owners[i]))
    return ProposalTree.ordered(root, nodes, len(nodes) + 1 if num_nodes is None else num_nodes)
