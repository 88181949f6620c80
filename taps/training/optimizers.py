"""What updates a head's weights: AdamW, or Muon for matrices. Knows parameters; nothing of losses or data."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

Optimizer = Literal["adamw", "muon"]
_BETAS = (0.9, 0.95)


def optimizers(module: nn.Module, kind: Optimizer, weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers of a module's trainable parameters; who uses them sets the learning rate.

    Muon (Jordan et al. 2024) takes the matrices, with updates as large as AdamW's (Liu et al. 2502.16982,
    section 2.2), so that one learning rate serves both; vectors stay with AdamW.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    if kind == "adamw":
        return [torch.optim.AdamW(weights, betas=_BETAS, weight_decay=weight_decay)]
    matrices, vectors = [p for p in weights if p.ndim == 2], [p for p in weights if p.ndim != 2]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if vectors:
        found.append(torch.optim.AdamW(vectors, betas=_BETAS, weight_decay=weight_decay))
    return found
