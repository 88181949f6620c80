"""The margin that tells a near-tie from a bug, on distributions worked out by hand."""

from __future__ import annotations

import pytest
import torch

from taps.shaping import SamplingParams
from tests.divergence import margin


def of(probabilities: list[float], a: int, b: int, params: SamplingParams) -> float:
    return margin(torch.tensor(probabilities).log(), 7, [], a, b, params)


def test_greedy_tokens_differ_by_their_logits() -> None:
    params = SamplingParams(temperature=0.0)
    assert of([0.5, 0.25, 0.25], 0, 1, params) == pytest.approx(0.6931, abs=1e-4)


def test_a_token_far_outside_the_nucleus_is_no_near_tie_with_the_last_one_inside() -> None:
    params = SamplingParams(top_p=0.9)
    assert of([0.6, 0.31, 0.05, 0.04], 1, 3, params) == pytest.approx(0.06, abs=1e-6)


def test_a_token_at_the_edge_of_the_nucleus_is_a_near_tie_with_any() -> None:
    params = SamplingParams(top_p=0.9)
    assert of([0.6, 0.3000001, 0.0599999, 0.04], 0, 2, params) < 1e-4


def test_a_token_below_the_top_k_is_as_far_as_its_logit() -> None:
    params = SamplingParams(top_k=2)
    assert of([0.5, 0.3, 0.2], 0, 2, params) == pytest.approx(0.4055, abs=1e-4)


def test_of_two_excluded_tokens_the_farther_counts() -> None:
    params = SamplingParams(top_p=0.5)
    assert of([0.6, 0.2, 0.15, 0.05], 1, 3, params) == pytest.approx(0.45, abs=1e-6)


def test_sampled_tokens_differ_by_their_noise_too() -> None:
    assert of([0.5, 0.5], 0, 1, SamplingParams(seed=3)) > 0.01
