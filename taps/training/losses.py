"""The training losses of draft heads. Pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """EAGLE-2's are 1 and 0.1; HASS adds its top-K distillation with weight 1."""

    feature: float = 1.0
    token: float = 0.1
    top_k: float = 0.0
    k: int = 10


class TargetDistribution(NamedTuple):
    """What the target says of the tokens a head may draft."""

    p: Tensor  # [n, D], renormalised over the draft vocabulary
    likeliest: Tensor | None  # [n, k] indices, where a top-K loss needs them


class DraftLoss(NamedTuple):
    """Means over the rows that count."""

    total: Tensor
    feature: Tensor  # smooth L1 between predicted and target features
    token: Tensor  # cross-entropy between the target's and the draft's distributions, nats
    top_k: Tensor  # the part of it that the target's k likeliest tokens have, nats; 0 where it has no weight


def draft_loss(
    predicted: Tensor, features: Tensor, target: TargetDistribution, lm_head: Tensor, weights: LossWeights
) -> DraftLoss:
    """`w_f * smooth_l1(f', f) - w_t * sum_x p(x) log q(x) - w_k * sum_{x in top k of p} p(x) log q(x)`.

    The first two terms are EAGLE's (2401.15077, section 3.2; EAGLE-2 trains the same way), the third is the
    harmonised objective distillation of HASS (2408.15766, section 3.1).

    Args: predicted, features [n, H]: the head's and the target's features at the same positions; target: p
    there (`target_distribution`); lm_head [D, H]: the rows of the draft vocabulary, q is their softmax.
    """
    feature = F.smooth_l1_loss(predicted, features)
    weighted = target.p * F.linear(predicted, lm_head).log_softmax(-1)
    token = -weighted.sum(-1).mean()
    total = weights.feature * feature + weights.token * token
    top_k = torch.zeros_like(token)
    if target.likeliest is not None:
        top_k = -weighted.gather(-1, target.likeliest).sum(-1).mean()
        total = total + weights.top_k * top_k
    return DraftLoss(total, feature, token, top_k)


@torch.no_grad()
def target_distribution(features: Tensor, lm_head: Tensor, weights: LossWeights) -> TargetDistribution:
    """p from the target's features [n, H] and the rows of the draft vocabulary [D, H]."""
    p = F.linear(features, lm_head).softmax(-1)
    likeliest = p.topk(min(weights.k, p.shape[-1]), dim=-1).indices if weights.top_k else None
    return TargetDistribution(p, likeliest)
