"""Recordings side by side: padded tensors of what a draft head reads and should predict.

Knows recordings and tensors; nothing of files or heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from taps.recording.shards import Recording


class Batch(NamedTuple):
    """Right-padded sequences; pair i is (tokens[i], features[i]) = (t_{i+1}, f_i) and predicts labels[i]."""

    tokens: Tensor  # [B, T]
    features: Tensor  # [B, T, H]
    labels: Tensor  # [B, T, H]: f_{i+1}
    next_tokens: Tensor  # [B, T]: t_{i+2}, which the head's distribution after labels[i] is about
    known: Tensor  # [B, T] bool: there is a label, no padding
    answers: Tensor  # [B, T] bool: the label belongs to the answer

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def collate(recordings: Sequence[Recording]) -> Batch:
    """Pad recordings to one batch. A recording of n tokens has n - 2 pairs with a known label."""
    longest = max(len(r.tokens) for r in recordings) - 2
    hidden = recordings[0].features.shape[1]
    tokens = torch.zeros(len(recordings), longest, dtype=torch.long)
    next_tokens = torch.zeros(len(recordings), longest, dtype=torch.long)
    features = torch.zeros(len(recordings), longest, hidden)
    labels = torch.zeros(len(recordings), longest, hidden)
    known = torch.zeros(len(recordings), longest, dtype=torch.bool)
    answers = torch.zeros(len(recordings), longest, dtype=torch.bool)
    for row, recording in enumerate(recordings):
        n = len(recording.tokens) - 2
        tokens[row, :n] = recording.tokens[1:-1]
        next_tokens[row, :n] = recording.tokens[2:]
        features[row, :n] = recording.features[:-1]
        labels[row, :n] = recording.features[1:]
        known[row, :n] = True
        answers[row, max(recording.answer_start - 2, 0) : n] = True
    return Batch(tokens, features, labels, next_tokens, known, answers)
