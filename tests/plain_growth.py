"""One tree grown node by node in plain Python: what growth of many at once must equal."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from taps.drafting.drafter import Ask
from taps.tree import ROOT, ProposalTree


class PlainGrowth:
    """One tree while it grows. Nodes are numbered in the order they are added; 0 is the root."""

    def __init__(self, root: int, ask: Ask) -> None:
        self.ask = ask
        self._root = root
        self._nodes: list[tuple[int, int, float, int]] = []  # (token, parent, score, owners)
        self._entropies: list[float] = [0.0]  # [1 + nodes] of its children's distribution
        self._levels_left = ask.depth + 1
        self.frontier: list[int] = [ROOT]  # the nodes whose children come next; empty when the tree is grown

    def token(self, node: int) -> int:
        return self._nodes[node - 1][0] if node else self._root

    def parent(self, node: int) -> int:
        return self._nodes[node - 1][1]

    def _score(self, node: int) -> float:
        return self._nodes[node - 1][2] if node else 0.0

    def extend(
        self, tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], entropies: Sequence[float]
    ) -> None:
        """Add the children of every frontier node, best first, and move the frontier to the best of them.

        Growth ends when the best of the newest level is not better than the last node of a full tree.

        Args: tokens, logprobs: [frontier, k] candidates and their draft log-probability, nats, -inf for those
        that cannot be sampled; entropies [frontier] of the distributions they come from, nats.
        """
        first = len(self._nodes) + 1
        for node, children, scores in zip(self.frontier, tokens, logprobs, strict=True):
            base = self._score(node)
            possible = ((t, s) for t, s in zip(children, scores, strict=True) if s > -math.inf)
            self._nodes += [(t, node, base + s, 0) for t, s in possible]
        for node, entropy in zip(self.frontier, entropies, strict=True):
            self._entropies[node] = entropy
        self._entropies += [0.0] * (len(self._nodes) + 1 - first)
        newest = range(first, len(self._nodes) + 1)
        self._levels_left -= 1
        best = heapq.nlargest(self.ask.top_k, newest, key=self._score)
        goes_on = self._levels_left > 0 and best and self._score(best[0]) > self._last_score()
        self.frontier = best if goes_on else []

    def _last_score(self) -> float:
        """The lowest score in a full tree, which a node must exceed to enter; -inf while there is room."""
        size = self.ask.num_nodes - 1
        if size < 1:
            return 0.0
        scores = heapq.nlargest(size, (score for _, _, score, _ in self._nodes))
        return scores[-1] if len(scores) == size else -math.inf

    def tree(self) -> ProposalTree:
        """The best nodes, ordered."""
        return ProposalTree.ordered(self._root, self._nodes, self.ask.num_nodes, self._entropies)
