"""What one drafter's trees are worth in one session, by what became of those before.

Knows trees and texts; nothing of who asks, or what anything costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from taps.adaptive.calibration import Calibration
from taps.adaptive.gains import accepted_of
from taps.tree import ROOT, ProposalTree

_LEAST_LIKELY = 0.02  # of a node that is worth anything
_OWN, _TRUSTED = 0.85, 0.7  # of older trees, at each new one; tokens that others' count for


class Judge:
    """Of one drafter in one session. All share the calibration; how far it holds here is the session's."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._accepted = 0.0  # tokens in this session, older ones counting less, ...
        self._expected = 0.0  # ... and what was thought by what all sessions taught

    def worth(self, tree: ProposalTree) -> list[tuple[int, float]]:
        """Nodes and logarithms of their probabilities, without those that are hopeless."""
        scale = min((self._accepted + _TRUSTED) / (self._expected + _TRUSTED), 1.0 / _TRUSTED)
        logs = {ROOT: 0.0}
        for node in range(1, len(tree)):
            chance = min(scale * self._calibration.probability(tree.depths[node], tree.scores[node]), 1.0)
            if tree.parents[node] in logs and chance >= _LEAST_LIKELY:
                logs[node] = min(math.log(chance), logs[tree.parents[node]])
        return [pair for pair in logs.items() if pair[0] != ROOT]

    def learn(self, tree: ProposalTree, text: Sequence[int]) -> list[bool]:
        """Which nodes of a tree the text has. Args: text: what the target decided after its root."""
        accepted = accepted_of(tree.tokens, tree.parents, text)
        expected = 0.0
        for node in range(1, len(tree)):
            expected += self._calibration.probability(tree.depths[node], tree.scores[node])
            self._calibration.observe(tree.depths[node], tree.scores[node], accepted[node])
        self._accepted = _OWN * self._accepted + sum(accepted) - 1
        self._expected = _OWN * self._expected + expected
        return accepted
