"""The config.json of a draft head: what its one layer is like, and the card that says how it came to be.

Read from the EAGLE layout, whose settings are a Llama model's, or from the `speculators` format, which nests
them; written with the names that other engines read. Knows settings; nothing of weights on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from taps.models.causal_lm import fingerprint
from taps.models.checkpoint_files import InvalidCheckpoint, in_a_line, read_settings, write_whole
from taps.models.draft_head import DraftHead

_ROPE_TYPES = {"default", *ROPE_INIT_FUNCTIONS}


def _known_rope_type(name: str) -> str:
    if name not in _ROPE_TYPES:
        raise ValueError(f"{name!r} is not one of {', '.join(sorted(_ROPE_TYPES))}")
    return name


_RopeType = Annotated[str, AfterValidator(_known_rope_type)]


class RopeSettings(BaseModel):
    """How positions are told; beside its type there are numbers, by names that are the type's own."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, bool | float | list[float] | dict[str, Any] | None] = Field(init=False)

    rope_type: _RopeType | None = None
    type: _RopeType | None = None  # its older name
    rope_theta: float | None = None
    factor: float | None = Field(None, ge=1)


class HeadSettings(BaseModel):
    """What is read of a config.json. Biases and norms are told by the tensors that are there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = Field(1e-6, ge=0, lt=1)
    max_position_embeddings: PositiveInt = 2048
    original_max_position_embeddings: PositiveInt | None = None
    rope_theta: float | None = None
    rope_scaling: RopeSettings | None = None
    rope_parameters: RopeSettings | None = None
    taps: dict[str, Any] = {}


class HeadConfig(NamedTuple):
    """A head's config.json."""

    layer: LlamaConfig
    card: dict[str, Any]  # ours: the target's fingerprint, and how the head came to be


def read_head_config(directory: Path) -> HeadConfig:
    """Raises `InvalidCheckpoint` where config.json is not that of an EAGLE-2 or HASS head."""
    path = directory / "config.json"
    try:
        settings = HeadSettings.model_validate(_unnested(path, read_settings(directory)))
    except ValidationError as error:
        first = error.errors()[0]
        name, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise InvalidCheckpoint(f"{path} is not that of a head: {name}: {said}") from error
    given = settings.model_dump(exclude_unset=True, exclude_none=True, exclude={"taps"})
    try:
        layer = LlamaConfig(**given)
        _refuse_unusable(layer)
    except (
        StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError,
    ) as error:  # fmt: skip
        raise InvalidCheckpoint(f"{path} describes no layer that can be made: {in_a_line(error)}") from error
    return HeadConfig(layer, settings.taps)


def _unnested(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the layer beside the others, as the EAGLE layout has them."""
    if not settings.keys() & {"speculators_model_type", "speculators_config"}:
        return settings
    kind, layer = settings.get("speculators_model_type"), settings.get("transformer_layer_config")
    if kind != "eagle" or not isinstance(layer, dict):
        raise InvalidCheckpoint(
            f"{path} is in the format of `speculators` and of its kind {kind!r}; of that format the kind "
            "'eagle' with a transformer_layer_config can be read"
        )
    return settings | layer


def _refuse_unusable(layer: LlamaConfig) -> None:
    """Raise where the layer could be made but not run: an error that says why."""
    if layer.hidden_act not in ACT2FN:
        raise ValueError(f"the activation hidden_act {layer.hidden_act!r} is not known")
    if layer.num_attention_heads % (layer.num_key_value_heads or 1):
        raise ValueError(
            f"num_attention_heads {layer.num_attention_heads} is no multiple of num_key_value_heads "
            f"{layer.num_key_value_heads}"
        )
    frequencies = LlamaRotaryEmbedding(layer).inv_freq
    if 2 * frequencies.numel() != layer.head_dim or not frequencies.isfinite().all():
        raise ValueError(
            f"{layer.rope_parameters} makes no rotary embedding for a head_dim of {layer.head_dim}"
        )


def write_head_config(head: DraftHead, directory: Path, card: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write config.json for a head saved in `dtype`; `card` goes under "taps"."""
    saved_as = str(dtype).removeprefix("torch.")
    settings = head.config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],  # the layer's; vLLM makes of it the name of its EAGLE class
        "vocab_size": head.embeddings.shape[0],
        "hidden_size": head.config.hidden_size,
        "num_hidden_layers": 1,
        "dtype": saved_as,
        "torch_dtype": saved_as,
        **_biases(head),
        **_older_rope(head),
        "taps": dict(card) | {"target_fingerprint": head.own_embeddings_for or fingerprint(head.embeddings)},
    }
    text = json.dumps(settings, indent=2) + "\n"
    write_whole(directory / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _biases(head: DraftHead) -> dict[str, bool]:
    """Which there are: to EAGLE's loader `bias` is that of fc, and `qkv_bias` those of q, k and v."""
    biased = [name for name in head.trained() if name.endswith(".bias")]
    of_attention = [name for name in biased if "self_attn" in name]
    return {
        "bias": "fc.bias" in biased,
        "attention_bias": any("o_proj" in name for name in of_attention),
        "qkv_bias": any("o_proj" not in name for name in of_attention),
        "mlp_bias": any("mlp" in name for name in biased),
    }


def _older_rope(head: DraftHead) -> dict[str, Any]:
    """What EAGLE's own loader reads: without them it takes a rope base of 10,000."""
    rope = dict(head.config.rope_parameters or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.get("rope_type", "default")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope | {"type": kind}}
