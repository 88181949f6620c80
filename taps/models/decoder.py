"""A lean decoder for Llama-like models: about a dozen operations a layer instead of forty-five.

Weights come from the model that transformers loaded: queries, keys and values in one linear layer, gate and
up in another. Llama, Mistral without a window, Qwen2 and Qwen3 have this form, and draft heads' one layer.

Knows weights and operations; nothing of sampling or files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taps.models.cache import PagedCache
from taps.models.linear import RowLinear
from taps.models.operations import HeadNorms, Heads, Operations, Rope
from taps.models.step import Step

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Angles that depend on the position alone; others look at how long the whole forward is.
_ROPES = ("default", "linear", "llama3", "yarn")


class DecoderLayer:
    """One layer, over rows [n, H]."""

    def __init__(self, layer: Any, index: int, operations: Operations) -> None:
        """Args: layer: one of transformers' decoder layers of these families."""
        attention, mlp = layer.self_attn, layer.mlp
        self._index = index
        self._operations = operations
        self._qkv = RowLinear.joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = RowLinear.joined(attention.o_proj)
        self._gate_up = RowLinear.joined(mlp.gate_proj, mlp.up_proj)
        self._down = RowLinear.joined(mlp.down_proj)
        self._norms = tuple(_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        dim: int = attention.head_dim
        queries, keys = (linear.weight.shape[0] // dim for linear in (attention.q_proj, attention.k_proj))
        self._heads = Heads(queries, keys, dim, attention.scaling)
        self._head_norms = None
        if hasattr(attention, "q_norm"):
            (query, eps), (key, _) = _weighted(attention.q_norm), _weighted(attention.k_norm)
            self._head_norms = HeadNorms(query, key, eps)

    def __call__(self, x: Tensor, step: Step, cache: PagedCache, rope: Rope) -> Tensor:
        operations = self._operations
        qkv = self._qkv(self._normed(0, x))
        attended = operations.attend(self._index, qkv, step, cache, self._heads, rope, self._head_norms)
        x = x + self._out(attended)
        out: Tensor = x + self._down(operations.gate(self._gate_up(self._normed(1, x))))
        return out

    def _normed(self, which: int, x: Tensor) -> Tensor:
        norm = self._norms[which]
        return x if norm is None else self._operations.norm(x, *norm)


def _norm(norm: nn.Module) -> tuple[Tensor, float] | None:
    """Weight and epsilon; None where a head has no norm there."""
    return None if isinstance(norm, nn.Identity) else _weighted(norm)


def _weighted(norm: Any) -> tuple[Tensor, float]:
    return norm.weight.detach(), float(norm.variance_epsilon)


class Decoder:
    """A whole model: token ids in, features and logits out."""

    def __init__(self, model: Any, operations: Operations) -> None:
        body = model.model
        self.operations = operations
        self._embeddings: Tensor = body.embed_tokens.weight.detach()
        self._layers: list[DecoderLayer] = []
        for i, layer in enumerate(body.layers):
            self._layers.append(DecoderLayer(layer, i, operations))
            body.layers[i] = nn.Identity()  # its weights are needed once only
        self._norm = _weighted(body.norm)
        self._lm_head = RowLinear.joined(model.lm_head)
        self.rope = rope_of(body.rotary_emb)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, step: Step, cache: PagedCache, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, H] after the final norm, and logits [kept, V]. Args: ids [n]; keep [kept] rows."""
        self.rope.cover(step.num_positions)
        x = self._embeddings[ids]
        for layer in self._layers:
            x = layer(x, step, cache, self.rope)
        features = self.operations.norm(x, *self._norm)
        return features, self._lm_head(features[keep])


def is_lean(model: Any) -> bool:
    """Whether a model that transformers loaded has this form."""
    config = model.config.get_text_config()
    return config.model_type in _FAMILIES and is_lean_config(config)


def is_lean_config(config: Any) -> bool:
    """Whether layers of this config compute what ours do."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        getattr(config, "sliding_window", None) is None
        and getattr(config, "hidden_act", None) == "silu"
        and rope.get("rope_type", "default") in _ROPES
    )


def head_dim_of(config: Any) -> int:
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dim


def rope_of(rotary: Any) -> Rope:
    """Of one of transformers' rotary modules."""
    return Rope(rotary.inv_freq, float(rotary.attention_scaling))
