"""Draft heads on disk, in the EAGLE layout: config.json beside fc.*, layers.0.* and optional embed_tokens.*.

Two keys are ours: the tensor `draft_vocab` (ids the head drafts from) and, in config.json, `taps` (the
target's fingerprint and how the head came to be). Engines that know no draft vocabulary are given an export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taps.models.causal_lm import fingerprint
from taps.models.checkpoint_files import (
    InvalidCheckpoint,
    in_a_line,
    read_weights,
    resolve,
    weights_digest,
    write_whole,
)
from taps.models.draft_head import DraftHead
from taps.models.head_config import HeadConfig, read_head_config, write_head_config
from taps.models.head_tensors import DRAFT_VOCABULARY, FLOATS, OWN_EMBEDDINGS, plainly_named, refuse_misfits

__all__ = [
    "InvalidCheckpoint", "export_head", "load_head", "load_target_ends", "save_head", "target_fingerprint",
    "weights_digest",
]  # fmt: skip

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_LM_HEAD = "lm_head.weight"


def load_target_ends(target: str | Path) -> tuple[Tensor, Tensor]:
    """The target's input embeddings and `lm_head`, both [V, H], without loading the rest of it.

    Raises `InvalidCheckpoint` where there are none that can be read, or they do not fit each other.
    """
    directory = resolve(target, ["*.json", "*.safetensors"])
    embeddings = lm_head = None
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in _ends_in(path).items():
            if name.endswith(_LM_HEAD):
                lm_head = tensor
            else:
                embeddings = tensor
    if embeddings is None:
        raise InvalidCheckpoint(
            f"no input embeddings in the safetensors files of {directory}; an EAGLE head needs a target saved "
            "as safetensors with `save_pretrained`"
        )
    lm_head = embeddings if lm_head is None else lm_head
    _refuse_unfit_ends(directory, embeddings, lm_head)
    return embeddings, lm_head


def _ends_in(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names if name.endswith((*_EMBEDDINGS, _LM_HEAD))}
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{path} cannot be read, perhaps it is not whole: {in_a_line(error)}"
        ) from error


def _refuse_unfit_ends(directory: Path, embeddings: Tensor, lm_head: Tensor) -> None:
    if embeddings.dim() != 2 or embeddings.shape != lm_head.shape or 0 in embeddings.shape:
        raise InvalidCheckpoint(
            f"the target {directory} has embeddings of shape {tuple(embeddings.shape)} and an lm_head of "
            f"{tuple(lm_head.shape)}; an EAGLE head needs them alike, one row for each token of the vocabulary"
        )
    if not {embeddings.dtype, lm_head.dtype} <= FLOATS:
        raise InvalidCheckpoint(
            f"the target {directory} has embeddings of {embeddings.dtype} and an lm_head of {lm_head.dtype}; "
            "an EAGLE head needs floating-point numbers, not quantized ones"
        )


def target_fingerprint(target: str | Path) -> str:
    """The fingerprint of a target's checkpoint. Raises `InvalidCheckpoint` where it is not safetensors."""
    return fingerprint(load_target_ends(target)[0])


def load_head(path_or_id: str | Path, target: str | Path, dtype: torch.dtype) -> DraftHead:
    """An EAGLE-2 or HASS head for `target`, ready to draft.

    Raises `InvalidCheckpoint` where a file cannot be read, or config, weights and target do not fit.
    """
    directory = resolve(path_or_id)
    config = read_head_config(directory)
    embeddings, lm_head = load_target_ends(target)
    _refuse_other_target(directory, config, embeddings)
    weights = plainly_named(read_weights(directory))
    refuse_misfits(directory, weights, config.layer, dtype)
    draft_vocab, own = weights.pop(DRAFT_VOCABULARY, None), weights.pop(OWN_EMBEDDINGS, None)
    if own is not None and torch.equal(own, embeddings.to(own.dtype)):
        own = None  # published heads repeat the target's
    head = DraftHead(
        config.layer,
        embeddings if own is None else own,
        lm_head,
        None if draft_vocab is None else draft_vocab.int(),
        tensors=weights,
        own_embeddings_for=None if own is None else fingerprint(embeddings),
    )
    head.load_state_dict(weights, strict=False)
    return head.to(dtype).eval()


def _refuse_other_target(directory: Path, config: HeadConfig, embeddings: Tensor) -> None:
    vocab_size, hidden = embeddings.shape
    layer = config.layer
    if layer.hidden_size != hidden:
        raise InvalidCheckpoint(
            f"{directory} was made for a target of hidden size {layer.hidden_size}, not {hidden}"
        )
    if layer.vocab_size != vocab_size:
        raise InvalidCheckpoint(
            f"{directory} was made for a vocabulary of {layer.vocab_size} tokens, the target has {vocab_size}"
        )
    made_for = config.card.get("target_fingerprint")
    if made_for is not None and made_for != fingerprint(embeddings):
        raise InvalidCheckpoint(
            f"{directory} was trained for another target (fingerprint {made_for!r}, this target has "
            f"{fingerprint(embeddings)!r}); train a head for this one with `taps train`"
        )


def save_head(head: DraftHead, directory: Path, card: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write what a head has of its own; `card` goes to config.json under "taps"."""
    weights = _saved(head.trained(), dtype)
    if head.own_embeddings_for is not None:
        weights |= _saved({OWN_EMBEDDINGS: head.embeddings}, dtype)
    if head.draft_vocab.numel() < head.embeddings.shape[0]:
        weights[DRAFT_VOCABULARY] = head.draft_vocab.to(torch.int32).cpu()
    _write(directory, weights)
    write_head_config(head, directory, card, dtype)


def export_head(path_or_id: str | Path, target: str | Path, directory: Path, dtype: torch.dtype) -> None:
    """Write a head again for engines that read the EAGLE layout and nothing more.

    Its own weights and embeddings, the target's where it has none, in both file formats, without the draft
    vocabulary: there it drafts from the whole one. Raises `InvalidCheckpoint` as `load_head` does.
    """
    head = load_head(path_or_id, target, torch.float32)
    card = read_head_config(resolve(path_or_id)).card
    weights = _saved(head.trained() | {OWN_EMBEDDINGS: head.embeddings}, dtype)
    _write(directory, weights)
    write_whole(directory / "pytorch_model.bin", lambda path: torch.save(weights, path))
    write_head_config(head, directory, card, dtype)


def _saved(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: w.detach().to(dtype).contiguous().cpu() for name, w in weights.items()}


def _write(directory: Path, weights: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.safetensors"
    write_whole(path, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))
