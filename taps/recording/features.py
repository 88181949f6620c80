"""The target's features of recordings that were kept without them. Knows the target; nothing of heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taps.models.cache import PagedCache
from taps.models.causal_lm import CausalLM
from taps.models.step import Segment
from taps.recording.shards import Recording


class TargetFeatures:
    """Computes features by one packed prefill of all recordings of a batch."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    def __call__(self, recordings: Sequence[Recording]) -> list[Tensor]:
        """[n - 1, H] bfloat16 of each recording, on the CPU."""
        lengths = [len(r.tokens) - 1 for r in recordings]
        cache = PagedCache(len(recordings), max(lengths))
        segments = [Segment(cache.open(), length) for length in lengths]
        for segment in segments:
            cache.reserve(segment.sequence, segment.num_rows)
        tokens = [token for r in recordings for token in r.tokens[:-1].tolist()]
        features, _ = self._model.extend(segments, tokens, [], cache)
        return list(torch.split(features.to(torch.bfloat16).cpu(), lengths))
