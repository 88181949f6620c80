"""Composing: the drafters' trees in, one ordered tree out. Pure functions, any number of drafters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from taps.composing.merging import concatenated, merged
from taps.composing.routing import confidence, entropy, single
from taps.tree import ProposalTree

Compose = Callable[[Sequence[ProposalTree], int, int], ProposalTree]


def off(trees: Sequence[ProposalTree], root: int, num_nodes: int) -> ProposalTree:
    """Propose nothing: plain decoding."""
    return ProposalTree.root_only(root)


STRATEGIES: dict[str, Compose] = {
    "off": off,
    "single": single,
    "confidence": confidence,
    "entropy": entropy,
    "merged": merged,
}

__all__ = ["STRATEGIES", "Compose", "concatenated", "confidence", "entropy", "merged", "off", "single"]
