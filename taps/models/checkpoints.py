"""Draft heads on disk, in the EAGLE layout: config.json beside fc.*, layers.0.* and optional embed_tokens.*.

Two keys are ours: the tensor `draft_vocab` (ids the head drafts from) and, in config.json, `taps` (the
target's fingerprint and how the head came to be). Engines that know no draft vocabulary are given an export.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from taps.models.causal_lm import fingerprint
from taps.models.draft_head import DraftHead

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_OF_THE_TARGET = {"lm_head.weight", "layers.0.self_attn.rotary_emb.inv_freq"}  # and not read from heads
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


class InvalidCheckpoint(ValueError):
    """A head or target that cannot be read or does not fit; the message says what to do."""


def resolve(path_or_id: str | Path, patterns: list[str] | None = None) -> Path:
    """A local directory as it is; anything else as a Hugging Face id, downloaded to its cache."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InvalidCheckpoint(
            f"{str(path_or_id)!r} is neither a directory nor a model that can be downloaded: {error}"
        ) from error


def load_target_ends(target: str | Path) -> tuple[Tensor, Tensor]:
    """The target's input embeddings and `lm_head`, both [V, H], without loading the rest of it."""
    directory = resolve(target, ["*.json", "*.safetensors"])
    embeddings = lm_head = None
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name.endswith(_EMBEDDINGS):
                    embeddings = file.get_tensor(name)
                elif name.endswith("lm_head.weight"):
                    lm_head = file.get_tensor(name)
    if embeddings is None:
        raise InvalidCheckpoint(
            f"no input embeddings in the safetensors files of {directory}; an EAGLE head needs a target saved "
            "as safetensors with `save_pretrained`"
        )
    return embeddings, embeddings if lm_head is None else lm_head


def target_fingerprint(target: str | Path) -> str:
    """The fingerprint of a target's checkpoint. Raises `InvalidCheckpoint` where it is not safetensors."""
    return fingerprint(load_target_ends(target)[0])


def load_head(path_or_id: str | Path, target: str | Path, dtype: torch.dtype) -> DraftHead:
    """An EAGLE-2 or HASS head for `target`, ready to draft.

    Raises `InvalidCheckpoint` when keys are missing or the shapes are not those of the target.
    """
    directory = resolve(path_or_id)
    settings = _read_config(directory)
    weights = {_plain_name(k): v for k, v in _read_weights(directory).items()}
    for name in weights.keys() & _OF_THE_TARGET:
        del weights[name]
    embeddings, lm_head = load_target_ends(target)
    config = LlamaConfig(**{k: v for k, v in settings.items() if k not in ("taps", "architectures")})
    _check_fit(directory, settings, config, weights, embeddings)
    head = DraftHead(
        config,
        weights.pop("embed_tokens.weight", embeddings),
        lm_head,
        draft_vocab=weights.pop("draft_vocab", None),
        fc_bias="fc.bias" in weights,
        input_norm="layers.0.input_layernorm.weight" in weights,
    )
    missing = sorted(head.trained().keys() - weights.keys())
    if missing:
        raise InvalidCheckpoint(f"{directory} lacks {', '.join(missing)}: it is not an EAGLE-2 or HASS head")
    if unknown := sorted(weights.keys() - head.trained().keys()):
        raise InvalidCheckpoint(
            f"{directory} has {', '.join(unknown)}, which the one Llama layer of an EAGLE-2 or HASS head has "
            "no place for: it is a head of another kind"
        )
    try:
        head.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InvalidCheckpoint(f"the weights of {directory} are not those of its config: {error}") from error
    return head.to(dtype).eval()


def save_head(head: DraftHead, directory: Path, card: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write a head's own weights; `card` goes to config.json under "taps"."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = _own_weights(head, dtype)
    if head.draft_vocab.numel() < head.embeddings.shape[0]:
        weights["draft_vocab"] = head.draft_vocab.to(torch.int32).cpu()
    _write(directory / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    _write_config(head, directory, card)


def export_head(path_or_id: str | Path, target: str | Path, directory: Path, dtype: torch.dtype) -> None:
    """Write a head again for engines that read the EAGLE layout and nothing more.

    Its own weights and the target's embeddings, in both file formats, without the draft vocabulary: there it
    drafts from the whole one. Raises `InvalidCheckpoint` as `load_head` does.
    """
    head = load_head(path_or_id, target, torch.float32)
    card = _read_config(resolve(path_or_id)).get("taps", {})
    directory.mkdir(parents=True, exist_ok=True)
    embeddings = head.embeddings.to(dtype).contiguous().cpu()
    weights = _own_weights(head, dtype) | {"embed_tokens.weight": embeddings}
    _write(directory / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    _write(directory / "pytorch_model.bin", lambda path: torch.save(weights, path))
    _write_config(head, directory, card)


def _own_weights(head: DraftHead, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: w.detach().to(dtype).contiguous().cpu() for name, w in head.trained().items()}


def _write(path: Path, save: Callable[[Path], object]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    save(partial)
    partial.rename(path)


def _write_config(head: DraftHead, directory: Path, card: Mapping[str, Any]) -> None:
    settings = head.config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLMEagle"],
        "vocab_size": head.embeddings.shape[0],
        "hidden_size": head.config.hidden_size,
        "num_hidden_layers": 1,
        **_older_names(head),
        "taps": dict(card) | {"target_fingerprint": fingerprint(head.embeddings)},
    }
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _older_names(head: DraftHead) -> dict[str, Any]:
    """What EAGLE's own loader reads: by default it expects an fc bias, and a rope base of 10,000."""
    rope = dict(head.config.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    return {"bias": head.fc.bias is not None, "rope_theta": theta, "rope_scaling": scaling}


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise InvalidCheckpoint(f"{directory} has no config.json: it is not a head in the EAGLE layout")
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InvalidCheckpoint(f"{path} is not JSON: {error}") from error
    return settings


def _weight_file(directory: Path) -> Path | None:
    return next((path for name in _WEIGHT_FILES if (path := directory / name).is_file()), None)


def weights_digest(path_or_id: str | Path) -> str | None:
    """SHA-256 of a head's weight file, which tells heads of one name apart; None where there is none."""
    path = _weight_file(resolve(path_or_id))
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = _weight_file(directory)
    if path is None:
        raise InvalidCheckpoint(f"{directory} has neither {' nor '.join(_WEIGHT_FILES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read, perhaps it is not whole: {error}") from error
    return weights


def _plain_name(name: str) -> str:
    return name.removeprefix("model.").removeprefix("ea_layer.")


def _check_fit(
    directory: Path, settings: Mapping[str, Any], config: LlamaConfig,
    weights: Mapping[str, Tensor], embeddings: Tensor,
) -> None:  # fmt: skip
    vocab_size, hidden = embeddings.shape
    if "fc.weight" not in weights:
        raise InvalidCheckpoint(f"{directory} lacks fc.weight: it is not an EAGLE-2 or HASS head")
    if config.hidden_size != hidden:
        raise InvalidCheckpoint(
            f"{directory} was made for a target of hidden size {config.hidden_size}, not {hidden}"
        )
    if (shape := tuple(weights["fc.weight"].shape)) != (hidden, 2 * hidden):
        raise InvalidCheckpoint(
            f"{directory} has fc.weight of shape {shape}; an EAGLE-2 or HASS head for this target has "
            f"{(hidden, 2 * hidden)} (EAGLE-3 heads, which read three features, are another kind)"
        )
    if config.vocab_size != vocab_size:
        raise InvalidCheckpoint(
            f"{directory} was made for a vocabulary of {config.vocab_size} tokens, the target has {vocab_size}"
        )
    made_for = settings.get("taps", {}).get("target_fingerprint")
    if made_for is not None and made_for != fingerprint(embeddings):
        raise InvalidCheckpoint(
            f"{directory} was trained for another target (fingerprint {made_for}, this target has "
            f"{fingerprint(embeddings)}); train a head for this one with `taps train`"
        )
