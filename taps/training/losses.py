"""The EAGLE-2 training loss. Pure functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class EagleLoss(NamedTuple):
    """Means over the rows that count."""

    total: Tensor
    feature: Tensor  # smooth L1 between predicted and target features
    token: Tensor  # cross-entropy between the target's and the draft's distributions, nats


def eagle_loss(
    predicted: Tensor, features: Tensor, lm_head: Tensor, feature_weight: float, token_weight: float
) -> EagleLoss:
    """`w_f * smooth_l1(f', f) - w_t * sum_x p(x) log q(x)` (EAGLE, 2401.15077, section 3.2).

    Args: predicted, features [n, H]: the head's and the target's features at the same positions; lm_head
    [D, H]: the rows of the draft vocabulary. p and q are the softmax over those rows.
    """
    feature = F.smooth_l1_loss(predicted, features)
    target = F.linear(features, lm_head).softmax(-1)
    token = -(target * F.linear(predicted, lm_head).log_softmax(-1)).sum(-1).mean()
    return EagleLoss(feature_weight * feature + token_weight * token, feature, token)
