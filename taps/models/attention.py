"""Tree attention as one primitive, `extend`, registered with transformers under the name "taps".

Rows of many sessions are packed into one forward of batch size 1. Linear layers see one long row; only
attention looks at the segments: each row attends to its session's committed prefix and to its own
ancestors. A chain is prefill or plain decoding, a tree is verification, and levels added one after the
other are draft growth.

Knows segments, masks and the cache; nothing of sampling or of which model calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from taps.models.cache import SlotCache

ATTENTION_NAME = "taps"
# Above this many rows, grouping query heads into one long mask costs more memory than it saves time.
_GROUPED_ROWS = 128

# A layer type's rule over (batch, head, query index, key index), elementwise on tensors.
IndexRule = Callable[..., Any]


@dataclass(frozen=True)
class Segment:
    """One session's rows in a packed forward."""

    slot: int
    start: int  # first row in the packed input
    depths: Tensor  # [n] distance of each row to the committed prefix's end
    visible: Tensor | None  # [n, drafted + n] bool over this step's tree region; None is causal
    drafted: int = 0  # tree rows already in the slot after the committed prefix (growth by levels)

    @property
    def num_rows(self) -> int:
        return self.depths.numel()


class _LayerMasks:
    """A layer type's own index rule, and the additive masks made from it in this forward."""

    def __init__(self, rule: IndexRule) -> None:
        self.rule = rule
        self.made: dict[tuple[int, int, torch.device], Tensor | None] = {}


class PackedStep:
    """The segments of one forward: positions in, attention against the cache during it."""

    attention_name = ATTENTION_NAME

    def __init__(
        self, cache: SlotCache, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cache = cache
        self.segments = segments
        self.dtype = dtype
        self.device = device
        self.layers_seen: list[int] = []
        self._ends = [cache.length[s.slot] + s.drafted + s.num_rows for s in segments]
        assert max(self._ends) <= cache.max_len, f"{max(self._ends)} rows do not fit a slot of {cache.max_len}"
        # Where each packed row goes in the cache: its slot, and its place there.
        counts = torch.tensor([s.num_rows for s in segments])
        self._slots = torch.tensor([s.slot for s in segments]).repeat_interleave(counts).to(device)
        places = [torch.arange(end - s.num_rows, end) for s, end in zip(segments, self._ends, strict=True)]
        self._places = torch.cat(places).to(device)

    def positions(self) -> Tensor:
        """[1, rows] absolute position of every packed row."""
        parts = [self.cache.length[s.slot] + s.depths for s in self.segments]
        return torch.cat(parts)[None].to(self.device)

    def layer_masks(self) -> _LayerMasks:
        """Masks of a layer with plain causal attention."""
        return layer_masks()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, masks: _LayerMasks, **options: Any
    ) -> Tensor:
        """Write this step's rows to the cache and attend. [heads, rows, d] in, [rows, heads, d_v] out."""
        self.layers_seen.append(layer)
        keys, values = self.cache.layer(layer, key, value)
        # A device map may put layers on several devices.
        slots, places = self._slots.to(keys.device), self._places.to(keys.device)
        keys[slots, :, places] = key.transpose(0, 1)
        values[slots, :, places] = value.transpose(0, 1)
        outputs = []
        for segment, end in zip(self.segments, self._ends, strict=True):
            rows = query[:, segment.start : segment.start + segment.num_rows]
            seen_keys, seen_values = keys[segment.slot, :, :end], values[segment.slot, :, :end]
            out = self._attend_segment(segment, rows, seen_keys, seen_values, masks, **options)
            outputs.append(out.transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_segment(
        self,
        segment: Segment,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        masks: _LayerMasks,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """[heads, n, d] against [kv_heads, L, d] -> [heads, n, d_v], query heads grouped by KV head."""
        heads, n, dim = query.shape
        kv_heads = keys.shape[0]
        group = heads // kv_heads
        if softcap is None and sinks is None and n > _GROUPED_ROWS:
            out = F.scaled_dot_product_attention(
                query[None],
                keys[None],
                values[None],
                attn_mask=self._mask(segment, masks, 1, query.device),
                scale=scale,
                enable_gqa=group > 1,
            )
            return out[0]
        grouped = query.reshape(1, kv_heads, group * n, dim)
        mask = self._mask(segment, masks, group, query.device)
        if softcap is None and sinks is None:
            out = F.scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask, scale=scale)
        else:
            out = _eager(grouped[0], keys, values, mask, scale, softcap, sinks)
        return out.reshape(heads, n, values.shape[-1])

    def _mask(self, segment: Segment, masks: _LayerMasks, group: int, device: torch.device) -> Tensor | None:
        """[1, 1, group * n, L] additive mask, or None when every key is visible."""
        made_for = (segment.start, group, device)
        if made_for not in masks.made:
            visible = self._visible(segment, masks.rule)
            mask = None
            if not visible.all():
                mask = torch.zeros(visible.shape, dtype=self.dtype).masked_fill_(~visible, float("-inf"))
                mask = mask.repeat(group, 1)[None, None].to(device)
            masks.made[made_for] = mask
        return masks.made[made_for]

    def _visible(self, segment: Segment, rule: IndexRule) -> Tensor:
        """[n, L] bool: the committed prefix and the row's ancestors, within the layer's own rule."""
        committed, n = self.cache.length[segment.slot], segment.num_rows
        visible = torch.ones(n, committed + segment.drafted + n, dtype=torch.bool)
        if segment.visible is None:
            visible[:, committed:] = torch.ones(n, n, dtype=torch.bool).tril()
        else:
            visible[:, committed:] = segment.visible
        if rule is not causal_mask_function:
            assert segment.drafted == 0, "growth by levels needs a layer with plain causal attention"
            query_at = committed + segment.depths
            key_at = torch.cat([torch.arange(committed), query_at])
            visible &= rule(0, 0, query_at[:, None], key_at[None, :])
        return visible


def _eager(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with logit soft-capping or sinks, which the fused kernels lack.

    query [kv_heads, group * n, d], keys and values [kv_heads, L, d], sinks [heads].
    """
    scores = (query @ keys.transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask[0]
    if sinks is None:
        return scores.float().softmax(-1).to(query.dtype) @ values
    kv_heads, rows = query.shape[:2]
    group = sinks.numel() // kv_heads
    column = sinks.to(scores.dtype).view(kv_heads, group, 1)
    column = column.expand(kv_heads, group, rows // group).reshape(kv_heads, rows, 1)
    weights = torch.cat([scores, column], -1).float().softmax(-1)[..., :-1]
    return weights.to(query.dtype) @ values


def _taps_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _LayerMasks,
    scaling: float | None = None,
    packed: PackedStep | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a transformers attention layer calls: [1, heads, rows, d] -> [1, rows, heads, d_v]."""
    assert packed is not None, "a model set to 'taps' attention is called with packed=PackedStep(...)"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = packed.attend(
        layer, query[0], key[0], value[0], attention_mask, scale=scale, softcap=softcap, sinks=s_aux
    )
    return out[None], None


def layer_masks(mask_function: IndexRule = causal_mask_function, **_: Any) -> _LayerMasks:
    """What transformers calls to make a mask: keeps the layer type's own index rule for `attend`."""
    return _LayerMasks(mask_function)


AttentionInterface.register(ATTENTION_NAME, _taps_attention)
AttentionMaskInterface.register(ATTENTION_NAME, layer_masks)
