"""The tensors of a draft head: under which names, of which shapes and of what values they are accepted.

Knows names and tensors; nothing of files or of how a head computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig

from taps.models.checkpoint_files import InvalidCheckpoint

OWN_EMBEDDINGS = "embed_tokens.weight"
DRAFT_VOCABULARY = "draft_vocab"
FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_OF_THE_TARGET = {"lm_head.weight", "layers.0.self_attn.rotary_emb.inv_freq"}  # and not read from heads
_IN_SPECULATORS = {"fusion_fc.": "fc.", "transformer.": "layers.0."}
_INPUT_NORM = "layers.0.input_layernorm.weight"  # most heads have none
_MOST_NAMED = 4


def plainly_named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors by their names in the EAGLE layout, without those that are the target's in any case."""
    named = {_plain_name(name): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in named.items() if name not in _OF_THE_TARGET}


def _plain_name(name: str) -> str:
    """Some files have prefixes, and the `speculators` format has other words."""
    name = name.removeprefix("model.").removeprefix("ea_layer.")
    for theirs, ours in _IN_SPECULATORS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def tensor_shapes(layer: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a head with this layer can have, but for its draft vocabulary."""
    hidden, inner, head_dim = layer.hidden_size, layer.intermediate_size, layer.head_dim or 0
    queries, keys = layer.num_attention_heads * head_dim, (layer.num_key_value_heads or 0) * head_dim
    linears = {
        "fc": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj": (queries, hidden),
        "layers.0.self_attn.k_proj": (keys, hidden),
        "layers.0.self_attn.v_proj": (keys, hidden),
        "layers.0.self_attn.o_proj": (hidden, queries),
        "layers.0.mlp.gate_proj": (inner, hidden),
        "layers.0.mlp.up_proj": (inner, hidden),
        "layers.0.mlp.down_proj": (hidden, inner),
    }
    return {
        OWN_EMBEDDINGS: (layer.vocab_size, hidden),
        _INPUT_NORM: (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        **{f"{name}.weight": shape for name, shape in linears.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linears.items()},
    }


def _is_optional(name: str) -> bool:
    return name in (OWN_EMBEDDINGS, _INPUT_NORM) or name.endswith(".bias")


def refuse_misfits(
    where: object, weights: Mapping[str, Tensor], layer: LlamaConfig, dtype: torch.dtype
) -> None:
    """Raise `InvalidCheckpoint` where these are not the tensors of a head with this layer, finite in `dtype`.

    Args: where: what the message calls the head.
    """
    shapes = tensor_shapes(layer)
    if missing := {name for name in shapes if not _is_optional(name)} - weights.keys():
        raise InvalidCheckpoint(f"{where} lacks {_some(missing)}: it is not an EAGLE-2 or HASS head")
    if unknown := weights.keys() - shapes.keys() - {DRAFT_VOCABULARY}:
        raise InvalidCheckpoint(
            f"{where} has {_some(unknown)}, which the one Llama layer of an EAGLE-2 or HASS head has "
            "no place for: it is a head of another kind"
        )
    for name in sorted(weights.keys() & shapes.keys()):
        _refuse_shape(where, name, tuple(weights[name].shape), shapes[name])
        _refuse_values(where, name, weights[name], dtype)
    if (ids := weights.get(DRAFT_VOCABULARY)) is not None:
        _refuse_vocabulary(where, ids, layer.vocab_size)


def _refuse_shape(where: object, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape == expected:
        return
    hint = " (EAGLE-3 heads, which read three features, are another kind)" if name == "fc.weight" else ""
    raise InvalidCheckpoint(
        f"{where} has {name} of shape {shape}; by its config and the target it should have {expected}{hint}"
    )


def _refuse_values(where: object, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype not in FLOATS:
        raise InvalidCheckpoint(f"{where} has {name} of {tensor.dtype}; weights are floating-point numbers")
    if not tensor.to(dtype).isfinite().all():
        raise InvalidCheckpoint(f"{where} has {name} with values that are not finite in {dtype}")


def _refuse_vocabulary(where: object, ids: Tensor, vocab_size: int) -> None:
    if ids.dtype not in _INTEGERS or ids.dim() != 1 or not ids.numel():
        raise InvalidCheckpoint(
            f"{where} has {DRAFT_VOCABULARY} of shape {tuple(ids.shape)} and {ids.dtype}; it should list token "
            "ids, whole numbers in one dimension"
        )
    if ids.min() < 0 or ids.max() >= vocab_size or torch.unique(ids).numel() < ids.numel():
        raise InvalidCheckpoint(
            f"{where} has {DRAFT_VOCABULARY} with ids from {ids.min()} to {ids.max()}; it should list tokens "
            f"of a vocabulary of {vocab_size}, each of them once"
        )


def _some(names: Collection[str]) -> str:
    first = [ascii(name)[1:-1] for name in sorted(names)[:_MOST_NAMED]]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
