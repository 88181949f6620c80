"""Medians, ratios and intervals, on numbers made by hand."""

from __future__ import annotations

import pytest

from cluster.bench.comparison import estimate, geometric_mean, unit_ratios


def test_a_median_lies_in_its_interval_and_the_interval_in_the_values() -> None:
    found = estimate([4.0, 1.0, 9.0, 2.0, 3.0])
    assert found.value == 3.0
    assert 1.0 <= found.low <= 3.0 <= found.high <= 9.0
    assert found.low < found.high


def test_one_value_or_equal_ones_leave_no_doubt() -> None:
    assert estimate([2.5]) == (2.5, 2.5, 2.5)
    assert estimate([2.0] * 9) == (2.0, 2.0, 2.0)
    assert geometric_mean([[2.0] * 3, [8.0]]) == pytest.approx((4.0, 4.0, 4.0))


def test_an_interval_narrows_with_more_values() -> None:
    few, many = estimate([1.0, 2.0, 3.0]), estimate([1.0, 2.0, 3.0] * 40)
    assert many.high - many.low < few.high - few.low


def test_the_same_numbers_give_the_same_interval() -> None:
    assert estimate([1.0, 5.0, 2.0]) == estimate([1.0, 5.0, 2.0])


def test_ratios_are_taken_within_units_and_only_where_both_have_one() -> None:
    ours = {(0, ""): 20.0, (1, ""): 90.0, (2, ""): 7.0}
    theirs = {(0, ""): 10.0, (1, ""): 30.0, (3, ""): 1.0}
    assert unit_ratios(ours, theirs) == pytest.approx([2.0, 3.0])
    assert unit_ratios(ours, {}) == []


def test_a_machine_that_drifts_changes_no_ratio() -> None:
    theirs = {(number, ""): 10.0 * 0.7**number for number in range(6)}
    ours = {unit: 1.5 * speed for unit, speed in theirs.items()}
    assert estimate(unit_ratios(ours, theirs)) == pytest.approx((1.5, 1.5, 1.5))


def test_a_question_asked_in_several_rounds_is_one_unit_with_their_geometric_mean() -> None:
    ours = {(0, "a"): 2.0, (1, "a"): 8.0, (0, "b"): 5.0}
    theirs = dict.fromkeys(ours, 1.0)
    assert unit_ratios(ours, theirs) == pytest.approx([4.0, 5.0])


def test_the_mean_over_workloads_is_of_their_medians_however_many_units_each_has() -> None:
    found = geometric_mean([[1.0, 2.0, 100.0], [8.0]])
    assert found.value == pytest.approx(4.0)
    assert found.low == pytest.approx(8**0.5)
    assert found.high == pytest.approx(800**0.5)


def test_the_lower_bound_of_a_clear_gain_is_above_one() -> None:
    gains = [[1.3, 1.4, 1.35, 1.32, 1.5], [1.1, 1.2, 1.15, 1.12, 1.3]]
    assert 1.15 < geometric_mean(gains).low < geometric_mean(gains).value
