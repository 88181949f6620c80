"""Metrics: one definition of the acceptance length, and counts that leave out what was cut."""

from __future__ import annotations

import pytest

from taps.decoding.metrics import SpeculationCounts, drafters_in
from tests.fakes import make_verdict


def test_the_acceptance_length_is_pooled_over_passes() -> None:
    counts = SpeculationCounts()
    for num_tokens in (4, 1, 1):
        tokens = range(num_tokens)
        counts.observe(make_verdict(tokens, owners=[1] * (num_tokens - 1), num_nodes=7, depth=5), num_tokens)
    assert (counts.num_passes, counts.num_tokens, counts.num_accepted, counts.num_draft_tokens) == (3, 6, 3, 21)
    assert counts.acceptance_length == 2.0
    assert counts.draft_acceptance_rate == pytest.approx(3 / 21)


def test_no_passes_have_no_ratios() -> None:
    counts = SpeculationCounts()
    assert (counts.acceptance_length, counts.draft_acceptance_rate, counts.histogram()) == (0.0, 0.0, [0])


def test_plain_decoding_has_acceptance_length_one() -> None:
    counts = SpeculationCounts()
    for _ in range(5):
        counts.observe(make_verdict([3]), 1)
    assert counts.acceptance_length == 1.0
    assert counts.draft_acceptance_rate == 0.0
    assert counts.histogram() == [5]


def test_the_histogram_has_a_place_for_every_depth_that_was_checked() -> None:
    counts = SpeculationCounts()
    counts.observe(make_verdict([1, 2], owners=[1], num_nodes=9, depth=4), 2)
    counts.observe(make_verdict([3], num_nodes=2, depth=2), 1)
    assert counts.histogram() == [1, 1, 0, 0, 0]
    assert len(counts.histogram()) == counts.max_depth + 1
    assert sum(counts.histogram()) == counts.num_passes


def test_an_accepted_token_counts_for_every_drafter_that_proposed_it() -> None:
    counts = SpeculationCounts()
    counts.observe(make_verdict([1, 2, 3, 4], owners=[0b011, 0b100, 0b101], num_nodes=8, depth=3), 4)
    assert counts.accepted_by_drafter == {0: 2, 1: 1, 2: 2}
    assert counts.accepted_at == {(0, 1): 1, (1, 1): 1, (2, 2): 1, (0, 3): 1, (2, 3): 1}
    assert counts.num_accepted == 3


@pytest.mark.parametrize(("delivered", "accepted"), [(4, 3), (3, 3), (2, 2), (0, 0)])
def test_cut_tokens_are_not_counted(delivered: int, accepted: int) -> None:
    counts = SpeculationCounts()
    counts.observe(make_verdict([1, 2, 3, 4], owners=[1, 1, 2], num_nodes=8, depth=3), delivered)
    assert (counts.num_tokens, counts.num_accepted) == (delivered, accepted)
    assert counts.accepted_by_drafter.total() == accepted
    assert counts.histogram()[accepted] == 1


@pytest.mark.parametrize(("owners", "drafters"), [(0, []), (1, [0]), (0b110, [1, 2]), (1 << 40, [40])])
def test_owner_bits_are_drafter_numbers(owners: int, drafters: list[int]) -> None:
    assert drafters_in(owners) == drafters
