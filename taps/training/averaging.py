"""Averaging heads in weight space: one head from two, as TAPS studies it (2603.27027, section 4)."""

from __future__ import annotations

from pathlib import Path

import torch

from taps.models.checkpoints import InvalidCheckpoint, load_head, save_head
from taps.models.draft_head import DraftHead


def average(one: DraftHead, other: DraftHead, weight: float) -> DraftHead:
    """`weight * one + (1 - weight) * other`, drafting from both vocabularies.

    Raises `InvalidCheckpoint` where the names or shapes of their weights differ.
    """
    ours, theirs = one.trained(), other.trained()
    if {k: w.shape for k, w in ours.items()} != {k: w.shape for k, w in theirs.items()}:
        raise InvalidCheckpoint("the heads differ in their weights' names or shapes: they have no average")
    full = torch.zeros(one.embeddings.shape[0], one.embeddings.shape[1])
    vocabulary = torch.unique(torch.cat([one.draft_vocab, other.draft_vocab]))
    for head in (one, other):
        full[head.draft_vocab.long()] = head.lm_head.weight.float()
    averaged = DraftHead(
        one.config, one.embeddings, full.to(one.lm_head.weight.dtype), vocabulary,
        fc_bias="fc.bias" in ours, input_norm="layers.0.input_layernorm.weight" in ours,
    )  # fmt: skip
    mixed = {name: weight * w.float() + (1 - weight) * theirs[name].float() for name, w in ours.items()}
    averaged.load_state_dict(mixed, strict=False)
    return averaged.eval()


def average_checkpoints(one: Path, other: Path, weight: float, target: str, out: Path) -> None:
    """Average two head directories into a third. Raises `InvalidCheckpoint`."""
    heads = [load_head(path, target, torch.float32) for path in (one, other)]
    card = {"averaged": {str(one): weight, str(other): 1 - weight}}
    save_head(average(heads[0], heads[1], weight), out, card, torch.bfloat16)
