"""Averaging heads in weight space: one head from two, as TAPS studies it (2603.27027, section 4)."""

from __future__ import annotations

from pathlib import Path

import torch

from taps.models.checkpoints import InvalidCheckpoint, load_head, save_head
from taps.models.draft_head import DraftHead

_SETTINGS = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters")


def average(one: DraftHead, other: DraftHead, weight: float) -> DraftHead:
    """`weight * one + (1 - weight) * other`, drafting from both vocabularies.

    Raises `InvalidCheckpoint` where they differ in more than the values of their weights.
    """
    _refuse_unlike(one, other)
    ours, theirs = one.trained(), other.trained()
    full = torch.zeros(one.embeddings.shape[0], one.embeddings.shape[1])
    vocabulary = torch.unique(torch.cat([one.draft_vocab, other.draft_vocab]))
    for head in (one, other):
        full[head.draft_vocab.long()] = head.lm_head.weight.float()
    mixed = {name: weight * w.float() + (1 - weight) * theirs[name].float() for name, w in ours.items()}
    return one.remade(mixed, full.to(one.lm_head.weight.dtype), vocabulary).eval()


def _refuse_unlike(one: DraftHead, other: DraftHead) -> None:
    ours, theirs = one.trained(), other.trained()
    if {k: w.shape for k, w in ours.items()} != {k: w.shape for k, w in theirs.items()}:
        raise InvalidCheckpoint("the heads differ in their weights' names or shapes: they have no average")
    for name in _SETTINGS:
        values = getattr(one.config, name), getattr(other.config, name)
        if values[0] != values[1]:
            raise InvalidCheckpoint(
                f"the heads differ in {name}, {values[0]} and {values[1]}: they have no average"
            )
    if not torch.equal(one.embeddings, other.embeddings):
        raise InvalidCheckpoint(
            "the heads read different embeddings, one has its own: weights that read them have no average"
        )


def average_checkpoints(one: Path, other: Path, weight: float, target: str, out: Path) -> None:
    """Average two head directories into a third. Raises `InvalidCheckpoint`."""
    heads = [load_head(path, target, torch.float32) for path in (one, other)]
    card = {"averaged": {str(one): weight, str(other): 1 - weight}}
    save_head(average(heads[0], heads[1], weight), out, card, torch.bfloat16)
