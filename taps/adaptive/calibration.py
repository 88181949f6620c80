"""What a drafted node is worth: how often the target decides it, by its depth and its drafter's score.

A draft's path probability is a guess, made outside its domain too surely; a coupled one is no probability at
all. The target's text says afterwards which nodes were right, also of trees that were not chosen.

Knows scores and outcomes; nothing of trees or of who drafts.
"""

from __future__ import annotations

import math
from bisect import bisect_left

# Between scores that are told apart, nats.
_EDGES = (-6.0, -4.5, -3.5, -2.7, -2.0, -1.5, -1.1, -0.8, -0.55, -0.35, -0.2, -0.1, -0.05, -0.02)
_DEPTHS = 5  # that are told apart; deeper ones count as the deepest
_PRIOR = 6.0  # outcomes that the score itself counts for
_MEMORY = 0.998  # of older outcomes, at each new one
_LEAST = 1e-4


class Calibration:
    """One drafter's, in one way to sample."""

    def __init__(self) -> None:
        size = (len(_EDGES) + 1) * _DEPTHS
        self._outcomes = [0.0] * size
        self._accepted = [0.0] * size

    def probability(self, depth: int, score: float) -> float:
        """That the target decides a node of this depth (from 1) and cumulative log-probability."""
        cell = self._cell(depth, score)
        prior = math.exp(min(score, 0.0))
        found = (self._accepted[cell] + _PRIOR * prior) / (self._outcomes[cell] + _PRIOR)
        return max(found, _LEAST)

    def observe(self, depth: int, score: float, accepted: bool) -> None:
        cell = self._cell(depth, score)
        self._outcomes[cell] = _MEMORY * self._outcomes[cell] + 1.0
        self._accepted[cell] = _MEMORY * self._accepted[cell] + accepted

    def _cell(self, depth: int, score: float) -> int:
        return (min(depth, _DEPTHS) - 1) * (len(_EDGES) + 1) + bisect_left(_EDGES, score)
