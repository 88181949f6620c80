"""What goes into the next step of the target: chunks of prefill, and how much of each tree.

Pure functions of the waiting work; knows lengths and scores, nothing of tensors or of who waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taps.tree import ProposalTree

_MEMORY = 0.97  # of the weight that measurements keep from step to step
MAX_SESSIONS, MAX_LEN = 16, 2048  # by default: sessions of a target, and positions of each


@dataclass(frozen=True)
class StepBudget:
    """Bounds of one step: they keep it short whoever is waiting."""

    prefill_tokens: int = 256  # prompt tokens, over all sessions
    tree_nodes: int = 32  # drafted nodes, over all sessions, roots not counted
    # Beside trees fewer prompt tokens are taken where the step would last longer, as far as was measured.
    longest_step_s: float = 0.1
    least_prefill_tokens: int = 32  # that are taken however long it lasts


class Pace:
    """How long steps last by their rows: a line through those that were measured, the newest above all."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        for name, value in (
            ("_weight", 1.0), ("_rows", rows), ("_seconds", seconds),
            ("_squares", rows * rows), ("_products", rows * seconds),
        ):  # fmt: skip
            setattr(self, name, _MEMORY * getattr(self, name) + value)

    def rows_within(self, seconds: float) -> int:
        """Rows of a step that lasts so long; no bound before anything was measured."""
        if not self._weight:
            return 1 << 30
        rows, mean = self._rows / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - rows * rows
        slope = (self._products / self._weight - rows * mean) / variance if variance > 0.5 else 0.0
        if slope <= 0.0:  # as many rows every time: they cost what they cost
            slope = mean / rows
        return max(int(min(rows + (seconds - mean) / slope, 1 << 30)), 0)


def share_nodes(trees: Sequence[ProposalTree], tree_nodes: int) -> list[ProposalTree]:
    """Keep the `tree_nodes` drafted nodes with the best path probability over all trees.

    Scores do not increase along a tree, so what is kept of each is a prefix, possibly only the root.
    """
    drafted = [(-tree.scores[i], i, t) for t, tree in enumerate(trees) for i in range(1, len(tree))]
    if len(drafted) <= tree_nodes:
        return list(trees)
    kept = [1] * len(trees)
    for _, _, t in sorted(drafted)[: max(tree_nodes, 0)]:
        kept[t] += 1
    return [tree.prefix(n) for tree, n in zip(trees, kept, strict=True)]


def share_prefill(remaining: Sequence[int], prefill_tokens: int) -> list[int]:
    """How many of each prompt's `remaining` tokens to take: first come, first served."""
    taken = []
    for tokens in remaining:
        taken.append(min(tokens, prefill_tokens))
        prefill_tokens -= taken[-1]
    return taken
