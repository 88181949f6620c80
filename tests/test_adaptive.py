"""The adaptive strategy: asks whom it pays to ask, at this load, and leaves the text as it is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from taps.adaptive.calibration import Calibration
from taps.adaptive.gains import Gains, accepted_of
from taps.adaptive.planning import Choice, Drafted, Planner
from taps.adaptive.policy import Adaptive, Fleet
from taps.context import Context
from taps.decoding.panel import Panel
from taps.decoding.policy import Candidate, Offer, Step
from taps.drafting.drafter import Ask
from taps.drafting.ngram import NgramSession
from taps.engine.costs import StepCosts
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from taps.verdict import PassCost
from tests.fakes import (
    PROMPT,
    ScriptedDrafter,
    TableTarget,
    VerifierPool,
    foresight,
    guesses,
    lies,
    run_steps,
    tokens_of,
)

TARGET = TableTarget()
GREEDY = SamplingParams(temperature=0.0)


# Calibration and gains


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_what_a_score_is_worth_is_learned_for_each_depth(rate: float) -> None:
    calibration, rng = Calibration(), random.Random(0)
    for _ in range(3000):
        calibration.observe(1, -0.3, rng.random() < rate)
    assert calibration.probability(1, -0.3) == pytest.approx(rate, abs=0.06)
    assert calibration.probability(1, -0.01) == pytest.approx(0.99, abs=0.01), "other scores are as they were"
    assert calibration.probability(2, -0.3) == pytest.approx(0.74, abs=0.01), "and other depths"


def test_an_unknown_score_is_taken_as_a_probability() -> None:
    for score in (-0.01, -0.5, -3.0):
        assert Calibration().probability(1, score) == pytest.approx(2.718281828**score, rel=1e-6)
    assert 0 < Calibration().probability(1, -1e9) < 0.001


def test_a_sessions_own_history_weighs_in_quickly() -> None:
    fleet = Gains()
    for _ in range(300):
        fleet.observe(2, 5)
    own = Gains(fleet)
    assert own.expected(5) == pytest.approx(fleet.expected(5)) == pytest.approx(2.0, abs=0.05)
    for _ in range(6):
        own.observe(0, 5)
    assert own.expected(5) < 0.8
    for _ in range(20):
        own.observe(4, 5)
    assert own.expected(5) > 3.5, "a domain may shift within an answer"


def test_all_sessions_history_goes_on_counting_for_a_sessions_own() -> None:
    fleet = Gains()
    own = Gains(fleet)
    for _ in range(100):
        own.observe(0, 5)
    before = own.expected(5)
    for _ in range(300):
        fleet.observe(4, 5)
    assert before + 0.1 < own.expected(5) < 1.0


def test_gains_grow_with_depth_and_end_with_what_is_accepted() -> None:
    gains = Gains()
    for _ in range(300):
        gains.observe(3, 5)
    assert [round(gains.expected(depth), 1) for depth in (1, 2, 3, 5)] == [1.0, 2.0, 3.0, 3.0]
    assert gains.expected(50) == gains.expected(8)


def test_the_nodes_of_a_tree_that_the_text_has() -> None:
    tokens, parents = [9, 5, 6, 7, 7, 8], [-1, 0, 0, 1, 2, 3]
    assert accepted_of(tokens, parents, [5, 7, 8]) == [True, True, False, True, False, True]
    assert accepted_of(tokens, parents, [5]) == [True, True, False, False, False, False]
    assert accepted_of(tokens, parents, []) == [True, False, False, False, False, False]


# Planning


class Clock:
    def __init__(self, step: float = 0.03) -> None:
        self.now, self._step = 0.0, step

    def __call__(self) -> float:
        self.now += self._step  # every look is a while later
        return self.now


def planner(per_row: float, sessions: int, draft_s: float = 0.004, together: float = 0.0008) -> Planner:
    """A pass takes 10 ms and so much a row; a draft of the usual depth 4 ms, and 0.8 for each other session."""
    rows = {size: 0.010 + per_row * (size - 1) for size in (1, 2, 8, 64, 512)}
    found = Planner(StepCosts(rows), Clock(0.06 / (sessions + 1)))
    for _ in range(300):
        for number in (1, 2, 4, 8, 16):
            for _ in range(number):
                found.asked("math")
            for _ in range(number):
                found.answered("math", 5, draft_s + together * (number - 1))
    for session in range(sessions):
        found.open(session)
    return found


def choose_all(of: Planner, gains: Sequence[float], free_gain: float = 0.0) -> list[Choice]:
    """What sessions of these gains do, once they know of one another."""
    for _ in range(3):
        chosen = [of.choose(session, {"math": steady(gain)}, free_gain) for session, gain in enumerate(gains)]
    return chosen


def steady(gain: float) -> Callable[[int], float]:
    """Tokens added by trees of a depth, half of it by the first two."""
    return lambda depth: gain * (1 - 0.5 ** (depth / 2))


def test_one_session_drafts_where_that_pays() -> None:
    for gain, drafts in ((2.0, True), (1.0, True), (0.3, False), (0.0, False)):
        (choice,) = choose_all(planner(0.0003, 1), [gain])
        assert bool(choice.drafters) == drafts, gain


def test_sixteen_sessions_do_not_where_rows_are_what_a_pass_costs() -> None:
    assert not any(choice.drafters for choice in choose_all(planner(0.0008, 16), [1.5] * 16))
    assert not any(choice.drafters for choice in choose_all(planner(0.00002, 16), [1.5] * 16)), "nor drafts"
    assert all(choice.drafters for choice in choose_all(planner(0.00002, 16, together=0.0), [1.5] * 16))


def test_those_draft_whom_it_gives_the_most() -> None:
    chosen = choose_all(planner(0.0003, 4), [7.0, 6.0, 0.1, 0.0])
    assert [bool(choice.drafters) for choice in chosen] == [True, True, False, False]


def test_a_draft_is_as_deep_as_pays() -> None:
    def chain(accepted: float) -> Callable[[int], float]:
        return lambda depth: sum(accepted**n for n in range(1, depth + 1))

    shallow, deep = (planner(0.0003, 1).choose(0, {"math": chain(p)}, 0.0).depth for p in (0.5, 0.95))
    assert shallow < deep


def test_nodes_at_hand_are_not_drafted_again() -> None:
    assert planner(0.0003, 1).choose(0, {"math": steady(2.0)}, 0.0).drafters
    assert not planner(0.0003, 1).choose(0, {"math": steady(2.0)}, 3.0).drafters


def test_nodes_at_hand_are_checked_where_they_are_worth_a_round_trip() -> None:
    of = planner(0.0003, 1)
    assert of.choose(0, {}, 2.0) == Choice((), 0, 2.0)
    assert of.choose(0, {}, 0.0).is_plain
    assert of.choose(0, {}, 0.05).is_plain
    assert all(choice.is_plain for choice in choose_all(planner(0.0008, 16), [0.0] * 16, free_gain=0.3))


def test_what_the_verifier_finds_by_itself_counts_for_plain_decoding() -> None:
    of = planner(0.0003, 1)
    assert of.choose(0, {}, 1.0) == Choice((), 0, 1.0)
    of.observe_plain(passes=4, nodes=8, tokens=10)
    for _ in range(20):
        of.observe_plain(passes=1, nodes=3, tokens=3)
    assert of.choose(0, {}, 1.0, version=1).is_plain


def test_what_steps_cost_beside_passes_counts() -> None:
    slow, gains = planner(0.0003, 1), [1.2]
    assert choose_all(slow, gains)[0].drafters
    for _ in range(100):
        slow.observe_step(PassCost(7, 11.8), 0.0118 + 0.030, Drafted(6, 1.0))
    assert not choose_all(slow, gains)[0].drafters
    for number in range(100):
        slow.observe_step(PassCost(1, 10.0 + 1e-6 * number), 0.010 + 0.030, None)
    assert choose_all(slow, gains)[0].drafters, "plain steps have it too"


def test_what_is_asked_together_is_one_draft_for_all_who_answers_first_or_last() -> None:
    of = planner(0.0003, 16)
    for _ in range(200):
        for _ in range(16):
            of.asked("math")
        for _ in range(16):
            of.answered("math", 5, 0.050)
    assert of.draft_s(("math",), 5, 16) == pytest.approx(0.050, rel=0.05)
    assert of.draft_s(("math",), 5, 9) < 0.040


def test_asking_aside_takes_little_of_the_time() -> None:
    clock = Clock()
    of = Planner(StepCosts({1: 0.01, 8: 0.012}), clock)
    for seconds in (0.02, 0.002, 0.2):
        for _ in range(50):
            of.asked("math")
            of.answered("math", 5, seconds, is_aside=True)
        began = clock.now
        asked = sum(of.may_probe() for _ in range(10_000))
        assert 0 < asked * seconds <= 0.012 * (clock.now - began)


@pytest.mark.parametrize(("with_it", "share"), [(200.0, 0.1), (400.0, 0.9)])
def test_the_verifier_drafts_itself_where_more_comes_of_it(with_it: float, share: float) -> None:
    """Sixteen sessions that decode plainly at 300 tokens/s, and at another rate with the verifier's drafts."""
    clock = Clock()
    of = Planner(StepCosts({1: 0.01, 16: 0.05}), clock)
    for session in range(16):
        of.open(session)
    looked = []
    for _ in range(1000):
        looked.append(of.looks())
        clock.now += 16 / (with_it if looked[-1] else 300.0)
        of.observe_step(PassCost(16, 50.0), 0.05, None, 16)
    assert looked[0], "before anything was measured"
    assert (sum(looked[500:]) > share * 500) == (with_it > 300.0)


# The policy, with verifier and drafters that are made up


def mistaken(tokens: Sequence[int], ask: Ask) -> ProposalTree:
    """A drafter who is sure of what never comes."""
    right = TARGET.decide(list(tokens), len(PROMPT), GREEDY)
    return ProposalTree.ordered(tokens[-1], [((right + 1) % TARGET.vocab_size, 0, -0.1, 0)], 2)


def policy_of(pool: VerifierPool, fleet: Fleet, drafters: Sequence[ScriptedDrafter | NgramSession]) -> Adaptive:
    ask = Ask(num_nodes=8, depth=4, sampling=pool.params)
    return Adaptive(fleet, [drafter.name for drafter in drafters], ask, explains=True)


async def decoded(
    drafters: Sequence[ScriptedDrafter | NgramSession], num_tokens: int = 60, fleet: Fleet | None = None,
    params: SamplingParams = GREEDY, ms_of: Callable[[int], float] = lambda rows: 10.0 + 0.3 * rows,
) -> list[Step]:  # fmt: skip
    pool, fleet = VerifierPool(TARGET, params, ms_of=ms_of), fleet or Fleet(Planner(clock=Clock()))
    policy = policy_of(pool, fleet, drafters)
    looks = itertools.count()  # by this clock everything takes a tenth of a millisecond, however busy all is

    def clock() -> float:
        return 1e-4 * next(looks)

    panel = Panel(drafters, deadline_s=60.0, clock=clock)
    steps = await run_steps(pool, panel, policy, num_tokens, clock=clock)
    policy.close()
    assert tokens_of(steps, num_tokens) == TARGET.continuation(PROMPT, params, num_tokens)
    assert fleet.planner.num_sessions == 1, "none is left open"
    assert not any(fleet.planner._asking.values())
    return steps


def asked(step: Step) -> list[str]:
    assert step.why is not None
    return list(step.why["asked"])


async def test_features_come_before_the_first_question_where_the_prefill_told_none() -> None:
    """As after `likely` said that nobody would be asked at once."""
    knows = ScriptedDrafter(0, foresight(TARGET, GREEDY))
    pool = VerifierPool(TARGET, GREEDY, ms_of=lambda rows: 10.0 + 0.3 * rows)
    fleet = Fleet(Planner(clock=Clock()))
    policy = policy_of(pool, fleet, [knows])
    policy.begins_asking = False
    steps = await run_steps(pool, Panel([knows], deadline_s=60.0), policy, 60)
    policy.close()
    assert tokens_of(steps, 60) == TARGET.continuation(PROMPT, GREEDY, 60)
    assert not len(steps[0].verdict.features)
    assert any(asked(step) for step in steps[1:])
    first = knows.deltas[0]
    assert first.feature_start + len(first.features) == first.end - 1
    assert len(first.features) >= len(PROMPT)


async def test_it_finds_the_drafter_who_is_right() -> None:
    knows = ScriptedDrafter(1, foresight(TARGET, GREEDY))
    steps = await decoded([ScriptedDrafter(0, guesses(3)), knows, ScriptedDrafter(2, lies(4))], 120)
    late = steps[len(steps) // 2 :]
    assert sum(asked(step) == ["drafter 1"] for step in late) > 0.9 * len(late)
    assert sum(len(step.verdict.tokens) for step in late) > 3 * len(late)


async def test_drafters_who_are_wrong_are_left_idle_and_tried_now_and_then() -> None:
    drafters = [ScriptedDrafter(index, mistaken) for index in range(3)]
    steps = await decoded(drafters, 300)
    late = [step for step in steps if not step.is_prefill][100:]
    assert sum(bool(asked(step)) for step in late) < 0.05 * len(late)
    assert all(0 < len(drafter.deltas) < 100 for drafter in drafters)


def asked_aside(monkeypatch: pytest.MonkeyPatch, others: Sequence[Candidate], looks: int) -> list[str]:
    """Who is asked aside where nobody pays, and all are due whenever there is time for one."""
    fleet = Fleet()
    monkeypatch.setattr(fleet.planner, "choose", lambda *_: Choice((), 0, 0.0, True))
    monkeypatch.setattr(fleet.planner, "may_probe", lambda: True)
    policy = Adaptive(fleet, [one.name for one in others], Ask(num_nodes=8, depth=4))
    context = Context(SessionState(tuple(PROMPT)), 0)
    aside: list[str] = []
    for _ in range(looks):
        context.tokens += [5] * 12
        aside += [one.name for one in policy.plan(context, others, ()).questions]
    return aside


def test_those_who_do_not_pay_are_asked_aside_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    drafters = [ScriptedDrafter(index, mistaken) for index in range(2)]
    aside = asked_aside(monkeypatch, drafters, 20)
    assert len(aside) >= 18
    assert aside == [drafters[n % 2].name for n in range(len(aside))]


def test_one_who_is_sent_for_and_does_not_come_keeps_nobody_from_being_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aside = asked_aside(monkeypatch, [Offer("away", 0), ScriptedDrafter(1, mistaken)], 20)
    assert aside.count("drafter 1") >= 16
    assert "away" in aside


async def test_what_one_answer_taught_the_next_one_knows() -> None:
    fleet = Fleet(Planner(clock=Clock()))
    wrong, right = ScriptedDrafter(0, guesses(3)), ScriptedDrafter(1, foresight(TARGET, GREEDY))
    await decoded([wrong, right], 200, fleet)
    first = await decoded(
        [ScriptedDrafter(0, guesses(3)), ScriptedDrafter(1, foresight(TARGET, GREEDY))], 30, fleet
    )
    assert next(asked(step) for step in first if not step.is_prefill) == ["drafter 1"]


async def test_rows_that_cost_too_much_are_not_drafted() -> None:
    steps = await decoded([ScriptedDrafter(0, foresight(TARGET, GREEDY))], 200, ms_of=lambda rows: 10.0 * rows)
    late = [step for step in steps if not step.is_prefill][60:]
    assert not any(asked(step) for step in late)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, seed=7)])
async def test_at_hand_it_drafts_for_nothing_where_text_repeats_itself(params: SamplingParams) -> None:
    steps = await decoded([NgramSession("ngram", 0), ScriptedDrafter(1, mistaken)], 200, params=params)
    drafted = [step for step in steps if 0b1 in step.drafted]
    assert drafted
    assert all(asked(step) == [] for step in drafted[6:]), "once it is known that the other is mistaken"


async def test_a_drafter_that_is_lost_is_gone_and_the_text_goes_on() -> None:
    dying = ScriptedDrafter(0, foresight(TARGET, GREEDY), dies_at=3)
    steps = await decoded([dying, ScriptedDrafter(1, foresight(TARGET, GREEDY))], 120)
    assert ["drafter 1"] in [asked(step) for step in steps if not step.is_prefill]


def test_what_drafters_say_of_themselves_counts_until_they_were_timed() -> None:
    of = Planner(StepCosts({1: 0.01, 8: 0.012}), Clock())
    of.meet("math", {1: 0.02, 16: 0.05})
    assert of.draft_s(("math",), 5, 1) == pytest.approx(0.02)
    assert of.draft_s(("math",), 5, 16) == pytest.approx(0.05)
    for _ in range(100):
        of.asked("math")
        of.answered("math", 5, 0.03)
    of.meet("math", {1: 0.02, 16: 0.05})
    assert of.draft_s(("math",), 5, 1) == pytest.approx(0.03, rel=0.05)


def test_only_those_who_may_be_asked_now_are_chosen() -> None:
    of = Planner(StepCosts({1: 0.01, 8: 0.012}), Clock(1e-4))
    of.open(0)
    gains = {"math": steady(3.0), "chat": steady(2.9), "code": steady(2.8)}
    for there in (("math", "chat"), ("chat", "code"), ("math", "code"), ("chat", "code")):
        for _ in range(3):
            chosen = of.choose(0, {name: gains[name] for name in there}, 0.0).drafters
            assert chosen == there[:1]
