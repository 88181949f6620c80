"""Harmonised context alignment: training passes that see what drafting sees (HASS, 2408.15766, section 3.2).

When a head drafts its j-th token, the newest j - 1 features it attends to are its own predictions, the older
ones are the target's. Pass j of training does the same at every position at once: the query at position i
attends to position i of pass j, i - 1 of pass j - 1, ..., and to all positions up to i - (j - 1) of the first
pass, which has the target's features. One pass alone is plain causal training, the EAGLE recipe.

Knows attention and features; nothing of losses or data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

_ATTENTION_NAME = "taps_aligned"


class Alignment:
    """The keys and values of the passes so far over one batch."""

    attention_name = _ATTENTION_NAME

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def layer_masks(self) -> None:
        """The masks are made in `attend`."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One more pass. query [B, heads, T, d], key and value [B, kv_heads, T, d] -> [B, heads, T, d]."""
        self._keys.append(key)
        self._values.append(value)
        num_passes, length = len(self._keys), query.shape[2]
        mask = None if num_passes == 1 else aligned_mask(num_passes, length, query.device)
        return F.scaled_dot_product_attention(
            query, torch.cat(self._keys, 2), torch.cat(self._values, 2), attn_mask=mask, scale=scale,
            is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip


def aligned_mask(num_passes: int, length: int, device: torch.device | None = None) -> Tensor:
    """[T, num_passes * T] bool: what each position of the last pass sees of the keys of all passes."""
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    first = back >= num_passes - 1
    later = [back == num_passes - 1 - earlier for earlier in range(1, num_passes)]
    return torch.cat([first, *later], dim=1)


def aligned_passes(head: nn.Module, tokens: Tensor, features: Tensor, num_passes: int) -> Iterator[Tensor]:
    """Predicted features [B, T, H] of each pass.

    Args: head: a `DraftHead`, also a wrapped one; tokens [B, T]: t_{i+1}; features [B, T, H]: the target's
    f_i. A later pass is fed the predictions of the one before, shifted by one and detached.
    """
    alignment = Alignment()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    inputs = features
    for _ in range(num_passes):
        predicted: Tensor = head(tokens, inputs, positions, alignment)
        yield predicted
        inputs = torch.cat([features[:, :1], predicted[:, :-1]], dim=1).detach()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
    scaling: float | None = None, packed: Alignment | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What a transformers attention layer calls: [B, heads, T, d] -> [B, T, heads, d]."""
    assert packed is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed.attend(query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION_NAME, _attention)
