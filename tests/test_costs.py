"""What steps cost: the table follows what is measured, and one wild step moves it little."""

from __future__ import annotations

import math
import random

import pytest

from taps.engine.costs import StepCosts


def by_row(size: float) -> float:
    return 0.010 + 0.0005 * size


def test_a_profile_is_linear_between_what_was_measured_and_beyond() -> None:
    costs = StepCosts({size: by_row(size) for size in (1, 2, 8, 64)})
    for size in (1, 5, 12, 33, 64, 100, 700):
        assert costs.seconds(size) == pytest.approx(by_row(size))


def test_steps_teach_it_what_they_cost() -> None:
    costs, rng = StepCosts(), random.Random(0)
    assert not costs.is_known
    for _ in range(3000):
        size = rng.randrange(1, 300)
        costs.observe(size, by_row(size))
    for size in (1, 10, 40, 130, 250):
        assert costs.seconds(size) == pytest.approx(by_row(size), rel=0.05)


def test_a_machine_that_slows_down_slows_all_sizes_down() -> None:
    costs = StepCosts({size: by_row(size) for size in (1, 2, 8, 64)})
    for _ in range(400):
        costs.observe(1, 2 * by_row(1))
    assert costs.seconds(1) == pytest.approx(2 * by_row(1), rel=0.05)
    assert costs.seconds(32) > 1.3 * by_row(32)


def test_one_step_that_was_held_up_counts_for_little() -> None:
    costs = StepCosts({size: by_row(size) for size in (1, 2, 8, 64)})
    costs.observe(8, 100.0)
    assert costs.seconds(8) < 1.1 * by_row(8)


def test_more_never_costs_less() -> None:
    costs, rng = StepCosts(), random.Random(1)
    for _ in range(500):
        costs.observe(rng.randrange(1, 100), rng.random())
        seconds = list(costs.table().values())
        assert seconds == sorted(seconds)


def test_as_much_fits_a_time_as_the_table_says() -> None:
    costs = StepCosts({size: by_row(size) for size in (1, 2, 8, 64)})
    for size in (1, 7, 40, 64, 900):
        assert costs.size_within(by_row(size) + 1e-9) == size
    assert costs.size_within(0.001) == 0
    assert costs.size_within(math.inf) == 1 << 30
    assert StepCosts().size_within(0.001) == 1 << 30


def test_noise_at_one_size_makes_no_larger_one_look_cheap() -> None:
    costs = StepCosts({size: 0.020 + 0.002 * size for size in (1, 2, 4, 8, 16, 32, 64)})
    for _ in range(100):
        costs.observe(16, 0.060)  # 52 ms by the others
        costs.observe(24, 0.068)
    more = [costs.seconds(size + 1) - costs.seconds(size) for size in range(1, 64)]
    assert more == pytest.approx(sorted(more))
    assert costs.seconds(32) - costs.seconds(16) > 0.015
    assert costs.seconds(20) == pytest.approx(0.064, rel=0.05)
