"""A step waits for sessions on their way back exactly as far as that pays."""

from __future__ import annotations

import pytest

from taps.engine.lingering import Lingering

STEP_S = 10.0


def usual(lingering: Lingering, session: str, takes: float) -> None:
    """The session came back after so many seconds, once."""
    lingering.leave(session, 0.0)
    lingering.arrive(session, takes)


def away(*takes: float, gone: float = 0.0) -> Lingering:
    """Sessions that left so many seconds ago, now being 100."""
    lingering = Lingering()
    for number, seconds in enumerate(takes):
        usual(lingering, f"session {number}", seconds)
        lingering.leave(f"session {number}", 100.0 - gone)
    return lingering


def test_nobody_is_waited_for_of_whom_nothing_is_known() -> None:
    lingering = Lingering()
    lingering.arrive("first job", 0.0)
    lingering.leave("new", 0.0)
    assert lingering.wait_s(1, STEP_S, 0.0) == 0


@pytest.mark.parametrize(
    ("num_waiting", "takes", "waits"),
    [
        (8, [4.0] * 8, 4.0),  # two halves become one
        (1, [4.0] * 15, 4.0),
        (15, [4.0], 0.0),  # fifteen do not wait for one ...
        (15, [0.5], 0.5),  # ... unless it is nearly there
        (4, [1.0, 8.0], 1.0),  # as far as it pays
        (1, [9.9], 0.0),
    ],
)
def test_it_waits_as_long_as_it_costs_those_there_no_more_than_it_saves_the_others(
    num_waiting: int, takes: list[float], waits: float
) -> None:
    assert away(*takes).wait_s(num_waiting, STEP_S, 100.0) == pytest.approx(waits)


def test_one_that_is_overdue_may_never_come() -> None:
    assert away(4.0, gone=3.0).wait_s(1, STEP_S, 100.0) == pytest.approx(1.0)
    assert 0 < away(4.0, gone=5.0).wait_s(1, STEP_S, 100.0) < 4.0
    assert away(4.0, gone=6.1).wait_s(1, STEP_S, 100.0) == 0


def test_one_that_closed_is_forgotten() -> None:
    lingering = away(4.0)
    lingering.forget("session 0")
    assert lingering.wait_s(1, STEP_S, 100.0) == 0


def test_what_a_session_usually_takes_follows_what_it_takes() -> None:
    lingering = away(4.0)
    for turn in range(30):
        lingering.arrive("session 0", 102.0 + 10 * turn)
        lingering.leave("session 0", 110.0 + 10 * turn)
    assert lingering.wait_s(1, STEP_S, 400.0) == pytest.approx(2.0, abs=0.01)
