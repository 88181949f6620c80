"""A lean decoder for Llama-like models: about a dozen operations a layer instead of forty-five.

Weights come from the model that transformers loaded: queries, keys and values in one linear layer, gate and
up in another. Llama, Mistral without a window, Qwen2 and Qwen3 have this form, and draft heads' one layer.

Knows weights and operations; nothing of sampling or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from taps.models.cache import PagedCache
from taps.models.operations import HeadNorms, Heads, LayerWeights, LinearWeights, Norm, Operations, Rope
from taps.models.step import Step

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Angles that depend on the position alone; others look at how long the whole forward is.
_ROPES = ("default", "linear", "llama3", "yarn")


def layer_weights(layer: Any) -> LayerWeights:
    """Of one of transformers' decoder layers of these families."""
    attention, mlp = layer.self_attn, layer.mlp
    dim: int = attention.head_dim
    queries, keys = (linear.weight.shape[0] // dim for linear in (attention.q_proj, attention.k_proj))
    head_norms = None
    if hasattr(attention, "q_norm"):
        (query, eps), (key, _) = norm_of(attention.q_norm), norm_of(attention.k_norm)
        head_norms = HeadNorms(query, key, eps)
    return LayerWeights(
        # A head may have no norm there.
        None if isinstance(layer.input_layernorm, nn.Identity) else norm_of(layer.input_layernorm),
        norm_of(layer.post_attention_layernorm),
        joined(attention.q_proj, attention.k_proj, attention.v_proj), joined(attention.o_proj),
        joined(mlp.gate_proj, mlp.up_proj), joined(mlp.down_proj),
        Heads(queries, keys, dim, attention.scaling), head_norms,
    )  # fmt: skip


def joined(*linears: nn.Linear) -> LinearWeights:
    """Several layers over the same input as one: their outputs side by side."""
    if len(linears) == 1:
        return LinearWeights(linears[0].weight, linears[0].bias)
    biases = [linear.bias for linear in linears]
    bias = None
    if any(b is not None for b in biases):
        zeros = (linear.weight.new_zeros(linear.out_features) for linear in linears)
        bias = torch.cat([z if b is None else b for z, b in zip(zeros, biases, strict=True)])
    return LinearWeights(torch.cat([linear.weight for linear in linears]), bias)


def norm_of(norm: Any) -> Norm:
    return Norm(norm.weight.detach(), float(norm.variance_epsilon))


class Decoder:
    """A whole model: token ids in, features and logits out."""

    def __init__(self, model: Any, operations: Operations) -> None:
        body = model.model
        self.operations = operations
        self._embeddings: Tensor = body.embed_tokens.weight.detach()
        self._layers = operations.layers(_given_up(body.layers))
        self._norm = norm_of(body.norm)
        self._vocab_size = len(model.lm_head.weight)
        self._lm_head = operations.linear(joined(model.lm_head))
        self.rope = rope_of(body.rotary_emb)

    @property
    def in_kernel(self) -> bool:
        return self._layers.in_kernel

    @torch.inference_mode()
    def __call__(self, step: Step, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """Features [rows, H] after the final norm, and logits [n, V] of the rows that the step chooses."""
        self.rope.cover(step.num_positions)
        rows = step.on(self._embeddings.device)
        x = self._layers(self._embeddings[rows.tokens], step, cache, self.rope)
        features = self.operations.norm(x, *self._norm)
        if not len(rows.chosen):
            return features, features.new_empty(0, self._vocab_size)
        return features, self._lm_head(features[rows.chosen])


def _given_up(layers: Any) -> Iterator[LayerWeights]:
    """Weights layer by layer; the model that was loaded does not keep them."""
    for i, layer in enumerate(layers):
        layers[i] = nn.Identity()
        yield layer_weights(layer)


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
