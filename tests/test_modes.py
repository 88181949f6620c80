"""Plain decoding or drafting: what was measured decides, and the other one is tried now and then."""

from __future__ import annotations

import pytest

from taps.adaptive.modes import Modes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(modes: Modes, clock: Clock, seconds: float, rates: tuple[float, float], thought: float) -> float:
    """The share of the time that sessions draft. Args: rates: tokens a second plainly, and where they draft."""
    end, drafted = clock.now + seconds, 0.0
    owed = 0.0
    while clock.now < end:
        mode = modes.is_on(thought)
        clock.now += 0.02
        drafted += 0.02 * mode
        owed += 0.02 * rates[mode]
        modes.count(int(owed))
        owed -= int(owed)
    return drafted / seconds


def of(sessions: int) -> tuple[Modes, Clock]:
    clock = Clock()
    modes = Modes(lambda sessions: 40.0 * sessions, clock)
    modes.has(sessions)
    return modes, clock


@pytest.mark.parametrize("thought", [1.5, 0.8])
@pytest.mark.parametrize("rates", [(300.0, 200.0), (300.0, 400.0)])
def test_what_was_measured_decides_whatever_was_thought(thought: float, rates: tuple[float, float]) -> None:
    modes, clock = of(8)
    run(modes, clock, 40.0, rates, thought)
    share = run(modes, clock, 200.0, rates, thought)
    assert share > 0.95 if rates[1] > rates[0] else share < 0.04


def test_a_few_windows_do_not_outweigh_what_is_thought() -> None:
    """Trials see other prompts than plain decoding did: six windows of 0.3 s said 1.26 of what was 0.75."""
    modes, clock = of(16)
    run(modes, clock, 5.0, (300.0, 400.0), 0.9)
    assert modes.ratio(0.5) < 1.0 < modes.ratio(0.9)


def test_what_is_thought_to_be_hopeless_is_not_tried() -> None:
    modes, clock = of(8)
    assert run(modes, clock, 300.0, (300.0, 400.0), 0.4) == 0.0


def test_a_trial_that_gives_little_ends_early() -> None:
    modes, clock = of(4)
    assert 0.0 < run(modes, clock, 12.0, (300.0, 100.0), 0.9) * 12.0 < 1.0


def test_it_notices_within_minutes_what_changed() -> None:
    modes, clock = of(8)
    assert run(modes, clock, 200.0, (300.0, 200.0), 0.9) < 0.05
    run(modes, clock, 130.0, (300.0, 450.0), 0.9)
    assert run(modes, clock, 60.0, (300.0, 450.0), 0.9) > 0.9
    run(modes, clock, 130.0, (300.0, 150.0), 0.9)
    assert run(modes, clock, 60.0, (300.0, 150.0), 0.9) < 0.1


def test_loads_are_told_apart() -> None:
    modes, clock = of(16)
    run(modes, clock, 60.0, (300.0, 200.0), 1.2)
    modes.has(2)
    run(modes, clock, 60.0, (80.0, 120.0), 1.2)
    assert modes.ratio(1.5) == pytest.approx(1.5, abs=0.1)
    modes.has(16)
    assert modes.ratio(0.67) == pytest.approx(0.67, abs=0.07)


def test_one_session_needs_no_trials() -> None:
    modes, clock = of(1)
    assert run(modes, clock, 60.0, (60.0, 60.0), 1.2) == pytest.approx(1.0)
    assert run(modes, clock, 60.0, (60.0, 60.0), 0.9) == 0.0


def test_a_workload_that_comes_in_bursts_is_not_tried_anew_in_each() -> None:
    modes, clock = of(16)
    shares = []
    for _ in range(20):
        modes.has(16)
        shares.append(run(modes, clock, 6.0, (300.0, 150.0), 0.9))
        modes.has(0)
        clock.now += 60.0
    assert sum(share > 0.0 for share in shares) <= 5
    assert sum(shares) / len(shares) < 0.04
