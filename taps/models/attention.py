"""Our attention registered with transformers under the name "taps", for any causal LM whose layers call it.

Rows of many sessions are packed into one forward of batch size 1. Linear layers see one long row; only
attention looks at the step, and writes the rows' keys and values to the cache.

Knows what transformers calls attention with; `reference` computes it on the CPU, `sdpa` elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from taps.models import reference, sdpa
from taps.models.cache import PagedCache
from taps.models.reference import PositionRule, Scoring, write
from taps.models.step import Step

ATTENTION_NAME = "taps"


@dataclass
class Packed:
    """What one forward attends to."""

    step: Step
    cache: PagedCache
    layers_seen: list[int] = field(default_factory=list)

    attention_name = ATTENTION_NAME

    def layer_masks(self) -> None:
        """A draft head's layer has plain causal attention."""


def _taps_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PositionRule | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What a transformers attention layer calls: [1, heads, rows, d] -> [1, rows, heads, d_v]."""
    assert packed is not None, "a model set to 'taps' attention is called with packed=Packed(...)"
    layer = module.layer_idx
    assert isinstance(layer, int)
    packed.layers_seen.append(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows, new_keys, new_values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    keys, values = packed.cache.layer(layer, key, key.shape[1], key.shape[-1], value.shape[-1])
    step = packed.step
    write(step, new_keys, new_values, keys, values)
    attend = reference.attend if query.device.type == "cpu" else sdpa.attend
    return attend(step, rows, keys, values, Scoring(scale, softcap, s_aux, attention_mask))[None], None


def position_rule(mask_function: PositionRule = causal_mask_function, **_: Any) -> PositionRule | None:
    """What transformers calls to make a mask: keeps the layer type's own rule for `attend`; None is causal."""
    return None if mask_function is causal_mask_function else mask_function


AttentionInterface.register(ATTENTION_NAME, _taps_attention)
AttentionMaskInterface.register(ATTENTION_NAME, position_rule)
