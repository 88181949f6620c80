"""Losses by hand, and training passes that see exactly what drafting sees."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from taps.models.alignment import aligned_mask, aligned_passes
from taps.models.cache import Kept, PagedCache
from taps.models.draft_head import DraftHead
from taps.models.drafting_head import DraftingHead
from taps.models.step import Segment, Step, StepInputs
from taps.training import losses
from taps.training.losses import DraftLoss, LossWeights, draft_loss
from tests.tiny import HIDDEN, VOCAB, tiny_head


def loss_of(predicted: Tensor, features: Tensor, lm_head: Tensor, weights: LossWeights) -> DraftLoss:
    """Of one pass."""
    return draft_loss(predicted[None], features, lm_head, weights)


def test_the_loss_of_a_case_worked_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2), so the cross-entropy is ln 2; features differ by ln 3 > 1 and by 0."""
    loss = loss_of(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.eye(2), LossWeights(2.0, 0.5))
    feature = (math.log(3) - 0.5) / 2
    assert float(loss.feature) == pytest.approx(feature)
    assert float(loss.token) == pytest.approx(math.log(2))
    assert float(loss.total) == pytest.approx(2.0 * feature + 0.5 * math.log(2))


def test_the_top_k_loss_of_a_case_worked_by_hand() -> None:
    """p = (4, 2, 1, 1) / 8 and q is even: the two likeliest tokens carry 6/8 of ln 4."""
    features = torch.tensor([[math.log(4), math.log(2), 0.0, 0.0]])
    loss = loss_of(torch.zeros(1, 4), features, torch.eye(4), LossWeights(0.0, 0.0, 3.0, k=2))
    assert float(loss.top_k) == pytest.approx(0.75 * math.log(4))
    assert float(loss.total) == pytest.approx(3 * 0.75 * math.log(4))


def test_small_feature_errors_cost_half_their_square() -> None:
    loss = loss_of(torch.tensor([[0.4, 0.0]]), torch.zeros(1, 2), torch.eye(2), LossWeights(1.0, 0.0))
    assert float(loss.total) == pytest.approx(0.5 * 0.4**2 / 2)


def test_the_perfect_prediction_costs_the_targets_entropy_and_has_no_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    features, lm_head = torch.randn(5, 3, generator=draw), torch.randn(7, 3, generator=draw)
    predicted = features.clone().requires_grad_()
    loss = loss_of(predicted, features, lm_head, LossWeights())
    p = (features @ lm_head.T).softmax(-1)
    assert float(loss.feature.detach()) == 0.0
    assert float(loss.token.detach()) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.total, predicted)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("chunk_logits", [1, 21, 1 << 20])
@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(0.5, 0.2, 2.0, k=3)])
def test_loss_and_gradient_are_those_of_the_formula(
    weights: LossWeights, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", (chunk_logits, chunk_logits))
    draw = torch.Generator().manual_seed(2)
    features, lm_head = torch.randn(5, 3, generator=draw), torch.randn(7, 3, generator=draw)
    predicted = torch.randn(2, 5, 3, generator=draw, requires_grad=True)
    p = (features @ lm_head.T).softmax(-1)
    best = p.topk(3).indices
    parts = []
    for of_pass in predicted:
        log_q = (of_pass @ lm_head.T).log_softmax(-1)
        token, top_k = -(p * log_q).sum(-1), -(p * log_q).gather(-1, best).sum(-1)
        feature = torch.nn.functional.smooth_l1_loss(of_pass, features)
        parts.append(weights.feature * feature + (weights.token * token + weights.top_k * top_k).mean())
    expected = (parts[0] + parts[1]) / 2
    loss = draft_loss(predicted, features, lm_head, weights)
    torch.testing.assert_close(loss.total, expected)
    gradients = [torch.autograd.grad(3.0 * total, predicted)[0] for total in (loss.total, expected)]
    torch.testing.assert_close(*gradients)


def test_a_scaled_loss_in_float16_keeps_the_gradient_of_many_rows() -> None:
    draw = torch.Generator().manual_seed(4)
    features, lm_head = torch.randn(20_000, 3, generator=draw), 0.02 * torch.randn(7, 3, generator=draw)
    gradients, weights = [], LossWeights(feature=0.0)
    for kind in (torch.float32, torch.float16):
        predicted = torch.zeros(1, 20_000, 3, dtype=kind, requires_grad=True)
        with torch.autocast("cpu", torch.float16, enabled=kind == torch.float16):
            total = draft_loss(predicted, features, lm_head, weights).total
        gradients.append(torch.autograd.grad(2.0**16 * total, predicted)[0].float())
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.02


def test_the_mask_of_a_third_pass_worked_by_hand() -> None:
    """The newest position from this pass, the one before it from the second, older ones from the first."""
    first, second, third = torch.split(aligned_mask(3, 4).int(), 4, dim=1)
    assert first.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert second.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert third.tolist() == torch.eye(4).int().tolist()


def drafted_chain(head: DraftHead, tokens: Tensor, features: Tensor, root: int, depth: int) -> list[Tensor]:
    """Features predicted by drafting the recorded tokens from pair `root` on, pair by pair, as serving does."""
    cache, drafting = PagedCache(1, 64), DraftingHead(copy.deepcopy(head))
    sequence = cache.open()

    def extend(pairs: slice, inputs: Tensor) -> Tensor:
        count = len(inputs)
        cache.reserve(sequence, count)
        step = Step([Segment(sequence, count)], StepInputs(inputs.device), tokens[pairs].tolist())
        hidden = drafting(inputs, step, cache)
        cache.commit([Kept(sequence, range(count))])
        return hidden[-1]

    chain = [extend(slice(0, root + 1), features[: root + 1])]
    for pair in range(root + 1, root + depth):
        chain.append(extend(slice(pair, pair + 1), chain[-1][None]))
    return chain


def test_an_aligned_pass_sees_exactly_what_drafting_sees() -> None:
    head, depth = tiny_head(), 4
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (1, 9), generator=draw)
    features = torch.randn(1, 9, HIDDEN, generator=draw)
    with torch.no_grad():
        passes = list(aligned_passes(head, tokens, features, depth))
        for root in range(9 - depth + 1):
            chain = drafted_chain(head, tokens[0], features[0], root, depth)
            for j, drafted in enumerate(chain):
                torch.testing.assert_close(passes[j][0, root + j], drafted, atol=1e-5, rtol=1e-4)
