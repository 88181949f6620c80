"""How sure a drafter is, and how right: its tokens at every position of recorded answers, its trees where they
were grown.

Knows recordings, heads and trees; nothing of strategies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from taps.composing.routing import confidence_score
from taps.evaluation.replay import TreesByEnd
from taps.models.alignment import aligned_passes
from taps.models.draft_head import DraftHead
from taps.recording.batches import collate
from taps.recording.shards import Recording
from taps.tree import ProposalTree

_BINS = 20
_MAX_ENTROPY = 8.0  # nats; the last bin takes what is above


def _histogram() -> list[int]:
    return [0] * _BINS


@dataclass
class DrafterAnalysis:
    """Counts in equal bins: probabilities and confidences over [0, 1], entropies over [0, 8] nats."""

    nodes: list[int] = field(default_factory=_histogram)  # drafted nodes by path probability
    hits: list[int] = field(default_factory=_histogram)  # those on the target's path
    probability: list[float] = field(default_factory=lambda: [0.0] * _BINS)  # summed, for the bins' means
    # Of the likeliest next token, by whether it is the target's: its probability, its distribution's entropy.
    confidence: dict[str, list[int]] = field(default_factory=lambda: _by_outcome())
    entropy: dict[str, list[int]] = field(default_factory=lambda: _by_outcome())
    # Of the whole tree, as routers see it, by the outcome of its first node.
    tree_confidence: dict[str, list[int]] = field(default_factory=lambda: _by_outcome())
    tree_entropy: dict[str, list[int]] = field(default_factory=lambda: _by_outcome())

    @torch.inference_mode()
    def observe_tokens(self, head: DraftHead, recordings: Sequence[Recording]) -> None:
        """Count the token the head finds likeliest at every position of the answers."""
        batch = collate(recordings)
        predicted = next(aligned_passes(head, batch.tokens, batch.features, 1))
        logprobs = head.lm_head(predicted[batch.answers]).float().log_softmax(-1)
        best = logprobs.max(-1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        accepted = head.draft_vocab[best.indices] == batch.next_tokens[batch.answers]
        measured = zip(accepted.tolist(), best.values.exp().tolist(), entropies.tolist(), strict=True)
        for hit, probability, entropy in measured:
            outcome = "accepted" if hit else "rejected"
            self.confidence[outcome][_bin(probability)] += 1
            self.entropy[outcome][_bin(entropy / _MAX_ENTROPY)] += 1

    def observe_trees(self, recording: Recording, trees: TreesByEnd) -> None:
        """Count the trees grown along one recording."""
        tokens: list[int] = recording.tokens.tolist()
        for end, tree in trees.items():
            if len(tree) > 1:
                self._observe_tree(tree, tokens[end:])

    def _observe_tree(self, tree: ProposalTree, coming: Sequence[int]) -> None:
        on_path = [True] + [False] * (len(tree) - 1)
        for i in range(1, len(tree)):
            depth = tree.depths[i] - 1
            if depth >= len(coming):
                continue  # beyond the recording: not known
            on_path[i] = on_path[tree.parents[i]] and tree.tokens[i] == coming[depth]
            probability = math.exp(tree.scores[i])
            where = _bin(probability)
            self.nodes[where] += 1
            self.hits[where] += on_path[i]
            self.probability[where] += probability
        outcome = "accepted" if on_path[1] else "rejected"
        self.tree_confidence[outcome][_bin(confidence_score(tree))] += 1
        self.tree_entropy[outcome][_bin(tree.entropy / _MAX_ENTROPY)] += 1

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"probability": [round(p, 4) for p in self.probability]}


def _by_outcome() -> dict[str, list[int]]:
    return {"accepted": _histogram(), "rejected": _histogram()}


def _bin(share: float) -> int:
    return min(int(share * _BINS), _BINS - 1)
