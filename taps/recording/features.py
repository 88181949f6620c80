"""The target's features of recordings that were kept without them. Knows the target; nothing of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taps.models.attention import PackedStep, Segment
from taps.models.cache import SlotCache
from taps.models.causal_lm import CausalLM
from taps.recording.shards import Recording


class TargetFeatures:
    """Computes features by one packed prefill of all recordings of a batch."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def __call__(self, recordings: Sequence[Recording]) -> list[Tensor]:
        """[n - 1, H] bfloat16 of each recording, on the CPU."""
        lengths = [len(r.tokens) - 1 for r in recordings]
        cache = SlotCache(len(recordings), max(lengths))
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        segments = [
            Segment(cache.acquire(), start, torch.arange(length), None)
            for start, length in zip(starts, lengths, strict=False)
        ]
        tokens = [token for r in recordings for token in r.tokens[:-1].tolist()]
        step = PackedStep(cache, segments, self._model.dtype, self._model.device)
        features, _ = self._model.extend(tokens, step, [])
        kept = features.to(torch.bfloat16).cpu()
        return [kept[start : start + length] for start, length in zip(starts, lengths, strict=False)]
