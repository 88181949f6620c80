"""Attention by torch's fused kernels, one sequence after the other: fast on a GPU, and not exact to the bit.

Knows steps, pages and masks; nothing of models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taps.models.cache import PAGE
from taps.models.reference import Scoring
from taps.models.step import Segment, Step


def attend(step: Step, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """As `reference.attend`: [rows, heads, d] -> [rows, heads, d_v]."""
    parts = [
        _attend(segment, query[start : start + segment.num_rows], keys, values, scoring)
        for segment, start in zip(step.segments, step.starts, strict=False)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(segment: Segment, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    length = segment.sequence.length + segment.offsets.stop
    pages = torch.tensor(segment.sequence.pages[: -(-length // PAGE)], device=keys.device)
    # [1, kv_heads, L, d]
    seen_keys = keys[pages].permute(1, 0, 3, 2).flatten(1, 2)[None, :, :length]
    seen_values = values[pages].transpose(0, 1).flatten(1, 2)[None, :, :length]
    mask = _mask(segment, scoring).to(query.device)
    rows = query.transpose(0, 1)[None]
    grouped = query.shape[1] != keys.shape[1]
    if scoring.softcap is None and scoring.sinks is None:
        out = F.scaled_dot_product_attention(
            rows, seen_keys, seen_values, attn_mask=mask, scale=scoring.scale, enable_gqa=grouped
        )
    else:
        out = _eager(rows[0], seen_keys[0], seen_values[0], mask, scoring)[None]
    return out[0].transpose(0, 1)


def _mask(segment: Segment, scoring: Scoring) -> Tensor:
    """[n, L] bool: the committed positions and the row's own path, within the layer's own rule."""
    committed, n = segment.sequence.length, segment.num_rows
    visible = torch.ones(n, committed + segment.offsets.stop, dtype=torch.bool)
    behind = visible[:, committed:]
    if segment.paths is None:
        behind.tril_()
    else:
        behind.zero_()
        for row, path in enumerate(segment.paths):
            behind[row, list(path)] = True
    if scoring.rule is not None:
        assert segment.drafted == 0, "growth by levels needs a layer with plain causal attention"
        depths = torch.tensor([len(segment.path(row)) - 1 for row in range(n)])
        key_at = torch.cat([torch.arange(committed), committed + depths])
        visible &= scoring.rule(0, 0, (committed + depths)[:, None], key_at[None])
    return visible


def _eager(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """With soft-capping or sinks, which the fused kernels lack. [heads, n, d] -> [heads, n, d_v]."""
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = (query @ keys.transpose(1, 2)).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if scoring.sinks is not None:
        column = scoring.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(values.dtype) @ values
