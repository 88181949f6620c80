"""The training losses of draft heads. Pure functions of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that are looked at together, on a CPU and elsewhere.
_CHUNK_LOGITS = (1 << 21, 1 << 26)


@dataclass(frozen=True)
class LossWeights:
    """EAGLE-2's are 1 and 0.1; HASS adds its top-K distillation with weight 1."""

    feature: float = 1.0
    token: float = 0.1
    top_k: float = 0.0
    k: int = 10


class DraftLoss(NamedTuple):
    """Means over the rows that count, and over the passes."""

    total: Tensor
    feature: Tensor  # smooth L1 between predicted and target features
    token: Tensor  # cross-entropy between the target's and the draft's distributions, nats
    top_k: Tensor  # the part of it that the target's k likeliest tokens have, nats; 0 where it has no weight


def draft_loss(predicted: Tensor, features: Tensor, lm_head: Tensor, weights: LossWeights) -> DraftLoss:
    """`w_f * smooth_l1(f', f) - w_t * sum_x p(x) log q(x) - w_k * sum_{x in top k of p} p(x) log q(x)`.

    The first two terms are EAGLE's (2401.15077, section 3.2; EAGLE-2 trains the same way), the third is the
    harmonised objective distillation of HASS (2408.15766, section 3.1).

    Args: predicted [P, n, H]: the head's features in each pass; features [n, H]: the target's at the same
    positions; lm_head [D, H]: the rows of the draft vocabulary, whose softmax p and q are.
    """
    feature = F.smooth_l1_loss(predicted, features.expand_as(predicted))
    distilled, token, top_k = cast(Any, _Distillation).apply(predicted, features, lm_head, weights)
    return DraftLoss(weights.feature * feature + distilled, feature, token, top_k)


class _Distillation(torch.autograd.Function):
    """The cross-entropies, and their gradient in the same go, for a few rows at a time.

    Distributions over a vocabulary are large: of all rows at once they cost more time to write and read again
    than to compute, and on a GPU more memory than everything else.
    """

    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, features: Tensor, lm_head: Tensor, weights: LossWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.empty_like(predicted)
        token = predicted.new_zeros((), dtype=torch.float32)
        top_k = torch.zeros_like(token)
        chunk = max(1, _CHUNK_LOGITS[predicted.device.type != "cpu"] // len(lm_head))
        for start in range(0, len(features), chunk):
            rows = slice(start, start + chunk)
            p = F.linear(features[rows], lm_head).softmax(-1, torch.float32)
            wanted, likeliest = weights.token * p, None
            if weights.top_k:
                best = p.topk(min(weights.k, p.shape[-1]), dim=-1)
                likeliest = torch.zeros_like(p).scatter_(-1, best.indices, best.values)
                wanted += weights.top_k * likeliest
            mass = wanted.sum(-1, keepdim=True)
            for in_pass, of_pass in zip(predicted, gradient, strict=True):
                log_q = F.linear(in_pass[rows], lm_head).log_softmax(-1, torch.float32)
                token -= torch.dot(p.flatten(), log_q.flatten())
                if likeliest is not None:
                    top_k -= torch.dot(likeliest.flatten(), log_q.flatten())
                of_pass[rows] = F.linear(log_q.exp_().mul_(mass).sub_(wanted), lm_head.T)
        count = predicted.shape[0] * predicted.shape[1]
        ctx.save_for_backward(gradient)
        ctx.count = count
        token, top_k = token / count, top_k / count
        ctx.mark_non_differentiable(token, top_k)
        return weights.token * token + weights.top_k * top_k, token, top_k

    @staticmethod
    def backward(ctx: Any, of_distilled: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In float16 the scale of the loss has to come before the division: the quotient alone vanishes.
        return gradient * (of_distilled / ctx.count), None, None, None
