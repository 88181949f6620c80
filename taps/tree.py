"""The proposal tree: drafted continuations of the newest token.

Knows tokens, parents and probabilities; nothing of models, caches, Ray or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ROOT = 0
NO_PARENT = -1


class InvalidTree(ValueError):
    """A tree that breaks the order every consumer relies on; the message says where."""


@dataclass(frozen=True)
class ProposalTree:
    """Drafted tokens under the root, ordered so that every prefix is a tree.

    Node 0 is the root: the newest token, decided by the target and not yet in its KV cache. Parents
    come before children and scores never increase along the node order.
    """

    tokens: tuple[int, ...]  # [n] token ids
    parents: tuple[int, ...]  # [n] index of the parent; -1 for the root
    scores: tuple[float, ...]  # [n] cumulative draft log-probability, nats; 0 for the root
    owners: tuple[int, ...]  # [n] bit d is set when drafter d proposed this node; 0 for the root
    entropies: tuple[float, ...] = ()  # [n] of the distribution of a node's children, nats; () if not known
    # Scores are of the target's agreement, as learned, not of a draft: what does not pay need not be checked.
    calibrated: bool = False

    @classmethod
    def root_only(cls, token: int) -> ProposalTree:
        """The tree that proposes nothing: verifying it is plain decoding."""
        return cls((token,), (NO_PARENT,), (0.0,), (0,))

    @classmethod
    def ordered(
        cls,
        root: int,
        nodes: Iterable[tuple[int, int, float, int]],
        num_nodes: int,
        entropies: Sequence[float] = (),
    ) -> ProposalTree:
        """The best `num_nodes` (root included) of `nodes`, in the order a tree must have.

        `nodes` are (token, parent, score, owners); parents count the root as 0 and come before their
        children. A child scored above its parent is clamped to it. Ordered by (score, depth, index).
        `entropies` are by the same count.
        """
        tokens, parents, scores, owners, depths = [root], [NO_PARENT], [0.0], [0], [0]
        for token, parent, score, owner in nodes:
            tokens.append(token)
            parents.append(parent)
            scores.append(min(score, scores[parent]))
            owners.append(owner)
            depths.append(depths[parent] + 1)
        ranked = sorted(range(1, len(tokens)), key=lambda i: (-scores[i], depths[i], i))
        order = [ROOT, *ranked[: max(num_nodes - 1, 0)]]
        place = {old: new for new, old in enumerate(order)}
        return cls(
            tuple(tokens[i] for i in order),
            (NO_PARENT, *(place[parents[i]] for i in order[1:])),
            tuple(scores[i] for i in order),
            tuple(owners[i] for i in order),
            tuple(entropies[i] for i in order) if entropies else (),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """[n] distance to the root."""
        depths = [0] * len(self)
        for i in range(1, len(self)):
            depths[i] = depths[self.parents[i]] + 1
        return tuple(depths)

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The nodes that have children, in node order."""
        return tuple(sorted(set(self.parents[1:])))

    @cached_property
    def entropy(self) -> float:
        """Mean entropy of the draft distributions that gave the tree nodes, nats; 0 where not known.

        Others do not count: how far growth went beyond the tree must not change what it is worth.
        """
        return sum(self.entropies[i] for i in self.inner) / max(len(self.inner), 1) if self.entropies else 0.0

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node is the only child of the node before it."""
        return all(parent == i - 1 for i, parent in enumerate(self.parents))

    @cached_property
    def ancestry(self) -> Tensor:
        """[n, n] bool: node i may attend to node j, that is j is i or an ancestor of i."""
        visible = torch.eye(len(self), dtype=torch.bool)
        for i in range(1, len(self)):
            visible[i] |= visible[self.parents[i]]
        return visible

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """[n] the child indices of each node, in node order."""
        lists: list[list[int]] = [[] for _ in self.tokens]
        for i in range(1, len(self)):
            lists[self.parents[i]].append(i)
        return tuple(map(tuple, lists))

    def path(self, node: int) -> tuple[int, ...]:
        """Node indices from the root to `node`, both included."""
        path = []
        while node != NO_PARENT:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))

    def token_path(self, node: int) -> tuple[int, ...]:
        """Drafted tokens from below the root to `node`: the node's identity across trees."""
        return tuple(self.tokens[i] for i in self.path(node)[1:])

    def only(self, nodes: Sequence[int]) -> ProposalTree:
        """These nodes, in order, the root first; of each its parent is among them."""
        if len(nodes) == len(self):
            return self
        place = {old: new for new, old in enumerate(nodes)}
        return replace(
            self,
            tokens=tuple(self.tokens[i] for i in nodes),
            parents=(NO_PARENT, *(place[self.parents[i]] for i in nodes[1:])),
            scores=tuple(self.scores[i] for i in nodes),
            owners=tuple(self.owners[i] for i in nodes),
            entropies=tuple(self.entropies[i] for i in nodes) if self.entropies else (),
        )

    def prefix(self, num_nodes: int) -> ProposalTree:
        """The first `num_nodes` nodes (at least the root), which are a tree by construction."""
        n = max(1, num_nodes)
        if n >= len(self):
            return self
        return replace(
            self, tokens=self.tokens[:n], parents=self.parents[:n], scores=self.scores[:n],
            owners=self.owners[:n], entropies=self.entropies[:n],
        )  # fmt: skip

    def owned_by(self, drafter: int) -> ProposalTree:
        """The same tree with every drafted node owned by drafter number `drafter`."""
        owners = (0, *([1 << drafter] * (len(self) - 1)))
        return replace(self, owners=owners)

    def check(self) -> ProposalTree:
        """Return self, or raise `InvalidTree` when the lengths or the order are not those of a tree."""
        n = len(self.tokens)
        if n == 0 or not n == len(self.parents) == len(self.scores) == len(self.owners):
            raise InvalidTree("a tree needs equally many tokens, parents, scores and owners, at least one")
        if self.parents[ROOT] != NO_PARENT:
            raise InvalidTree("the first node of a tree is its root and has parent -1")
        if self.scores[ROOT] != 0:
            raise InvalidTree(f"the root has score {self.scores[ROOT]}, not 0")
        if len(self.entropies) not in (0, n) or not all(map(math.isfinite, self.entropies)):
            raise InvalidTree(f"a tree has a finite entropy for each of its {n} nodes, or none")
        for i in range(1, n):
            if not 0 <= self.parents[i] < i:
                raise InvalidTree(f"node {i} has parent {self.parents[i]}: parents come before children")
            if not self.scores[i] <= self.scores[i - 1]:
                raise InvalidTree(f"node {i} has score {self.scores[i]}: scores must not increase")
        return self
