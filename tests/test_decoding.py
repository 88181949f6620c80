"""The loop and the panel: whatever drafters and verifiers do, the text is the target's own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from taps.composing import STRATEGIES, Compose, concatenated, merged, off, single
from taps.context import Context
from taps.decoding import loop
from taps.decoding.loop import decode
from taps.decoding.panel import Panel
from taps.decoding.policy import Fixed, Step
from taps.drafting.drafter import Ask
from taps.peers import PeerBusy, PeerGone
from taps.session import SessionState
from taps.shaping import SamplingParams
from tests.fakes import (
    PROMPT,
    ScriptedDrafter,
    TableTarget,
    VerifierPool,
    ask_all,
    chi_square_p,
    foresight,
    guesses,
    lies,
    make_verdict,
    panel_of,
    positions_of,
    run_steps,
    tokens_of,
    turns,
)

NUM_TOKENS = 24
TARGET = TableTarget()
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0, seed=11)
ALL_PARAMS = {
    "greedy": GREEDY,
    "greedy with penalties": SamplingParams(0.0, presence_penalty=0.6, frequency_penalty=0.4),
    "sampled": SAMPLED,
    "sampled with penalties": SamplingParams(1.0, 0.95, presence_penalty=0.6, frequency_penalty=0.4, seed=3),
}
KINDS: dict[str, Callable[[int, SamplingParams], ScriptedDrafter]] = {
    "good": lambda index, params: ScriptedDrafter(index, foresight(TARGET, params)),
    "ignorant": lambda index, params: ScriptedDrafter(index, guesses(seed=index)),
    "lying": lambda index, params: ScriptedDrafter(index, lies(seed=index)),
    "late": lambda index, params: ScriptedDrafter(index, foresight(TARGET, params), wait=lambda: turns(3)),
    "dying": lambda index, params: ScriptedDrafter(index, foresight(TARGET, params), dies_at=3),
}
every_params = pytest.mark.parametrize("params", ALL_PARAMS.values(), ids=ALL_PARAMS)


def good(index: int = 0) -> ScriptedDrafter:
    return KINDS["good"](index, GREEDY)


def mid_answer() -> Context:
    """A context after the prefill, with one token decided."""
    context = Context(SessionState(tuple(PROMPT)), feature_window=8)
    context.restart(make_verdict([4], range(len(PROMPT))))
    return context


@every_params
async def test_decoding_without_drafters_is_plain_autoregressive_sampling(params: SamplingParams) -> None:
    steps = await run_steps(VerifierPool(TARGET, params), panel_of(), off, NUM_TOKENS)
    assert tokens_of(steps, NUM_TOKENS) == TARGET.continuation(PROMPT, params, NUM_TOKENS)
    assert [len(step.verdict.tokens) for step in steps] == [1] * NUM_TOKENS


@every_params
@pytest.mark.parametrize("num_drafters", [1, 2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_the_text_is_the_same_whatever_the_drafters_do(
    strategy: str, num_drafters: int, params: SamplingParams
) -> None:
    plain = TARGET.continuation(PROMPT, params, NUM_TOKENS)
    for kinds in itertools.combinations(KINDS, num_drafters):
        panel = panel_of(*(KINDS[kind](index, params) for index, kind in enumerate(kinds)))
        steps = await run_steps(VerifierPool(TARGET, params), panel, STRATEGIES[strategy], NUM_TOKENS)
        assert tokens_of(steps, NUM_TOKENS) == plain, kinds


@every_params
@pytest.mark.parametrize("tree_nodes", [0, 1, 3])
async def test_the_text_is_the_same_however_few_nodes_the_verifier_keeps(
    tree_nodes: int, params: SamplingParams
) -> None:
    panel = panel_of(KINDS["good"](0, params), KINDS["ignorant"](1, params))
    steps = await run_steps(VerifierPool(TARGET, params, tree_nodes=tree_nodes), panel, merged, NUM_TOKENS)
    assert tokens_of(steps, NUM_TOKENS) == TARGET.continuation(PROMPT, params, NUM_TOKENS)
    assert max(step.verdict.num_nodes for step in steps) == tree_nodes


@pytest.mark.parametrize("strategy", ["single", "confidence", "entropy", "merged"])
async def test_a_perfect_drafter_saves_passes_and_gets_the_credit(strategy: str) -> None:
    ask = Ask(num_nodes=8, depth=2)
    steps = await run_steps(
        VerifierPool(TARGET, SAMPLED), panel_of(KINDS["good"](1, SAMPLED)), STRATEGIES[strategy], 13, ask
    )
    assert [len(step.verdict.tokens) for step in steps] == [1, 4, 4, 4]
    assert {owner for step in steps for owner in step.verdict.owners} == {0b10}


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.0)


@every_params
@pytest.mark.usefixtures("no_delay")
async def test_a_lost_verifier_resumes_to_the_same_text(params: SamplingParams) -> None:
    """Lost during a verify, right after the prefill, during the prefill, and again later."""
    panel = panel_of(KINDS["good"](0, params), KINDS["late"](1, params))
    pool = VerifierPool(TARGET, params, lives=[3, 1, 0, 4])
    steps = await run_steps(pool, panel, merged, 40)
    assert tokens_of(steps, 40) == TARGET.continuation(PROMPT, params, 40)
    assert sum(step.is_prefill for step in steps) == 4
    assert pool.num_opened == 5


@pytest.mark.parametrize("lives", [[], [2, 0]])
async def test_closing_the_loop_frees_every_verifier_session(lives: list[int]) -> None:
    pool = VerifierPool(TARGET, GREEDY, lives)
    await run_steps(pool, panel_of(good()), merged, NUM_TOKENS)
    assert pool.num_opened == 1 + len(lives)
    assert pool.num_open == 0


@pytest.mark.usefixtures("no_delay")
async def test_the_loop_gives_up_when_too_many_verifiers_in_a_row_are_lost() -> None:
    pool = VerifierPool(TARGET, GREEDY, lives=[2, *[0] * 20])
    with pytest.raises(PeerGone):
        await run_steps(pool, panel_of(), off, NUM_TOKENS)
    assert (pool.num_opened, pool.num_open) == (9, 0)


@pytest.mark.usefixtures("no_delay")
async def test_progress_in_between_resets_the_count_of_lost_verifiers() -> None:
    pool = VerifierPool(TARGET, GREEDY, lives=[*[0] * 8, 2, *[0] * 7, 2, *[0] * 7])
    steps = await run_steps(pool, panel_of(), off, NUM_TOKENS)
    assert tokens_of(steps, NUM_TOKENS) == TARGET.continuation(PROMPT, GREEDY, NUM_TOKENS)


async def test_a_session_for_which_no_verifier_has_room_is_turned_away_at_once() -> None:
    pool = VerifierPool(TARGET, GREEDY, lives=[], busy={0})
    with pytest.raises(PeerBusy):
        await run_steps(pool, panel_of(), off, NUM_TOKENS)
    assert pool.num_opened == 1


@pytest.mark.usefixtures("no_delay")
async def test_a_started_session_waits_for_room_after_its_verifier_is_lost() -> None:
    pool = VerifierPool(TARGET, GREEDY, lives=[3], busy={1, 2})
    steps = await run_steps(pool, panel_of(), off, NUM_TOKENS)
    assert tokens_of(steps, NUM_TOKENS) == TARGET.continuation(PROMPT, GREEDY, NUM_TOKENS)
    assert pool.num_opened == 4


@pytest.mark.parametrize("compose", [merged, concatenated, STRATEGIES["confidence"]])
async def test_speculative_tokens_follow_the_exact_distribution_of_the_target(compose: Compose) -> None:
    target, num_seeds, length = TableTarget(vocab_size=3, spread=0.8), 700, 3
    sequences = list(itertools.product(range(3), repeat=length))
    expected = [1.0] * len(sequences)
    for i, sequence in enumerate(sequences):
        for n, token in enumerate(sequence):
            expected[i] *= float(target.logits([*PROMPT, *sequence[:n]]).double().softmax(0)[token])
    observed, num_accepted = [0] * len(sequences), 0
    for seed in range(num_seeds):
        panel = panel_of(*(ScriptedDrafter(i, guesses(seed=3 * seed + i, vocab_size=3)) for i in range(2)))
        pool = VerifierPool(target, SamplingParams(seed=seed))
        steps = await run_steps(pool, panel, compose, length)
        observed[sequences.index(tuple(tokens_of(steps, length)))] += 1
        num_accepted += sum(len(step.verdict.owners) for step in steps)
    assert num_accepted > num_seeds / 2, "this is about tokens that were drafted"
    assert chi_square_p(observed, expected) > 1e-3


async def test_every_drafter_hears_every_token_once_with_the_features_that_belong_to_it() -> None:
    drafters = [KINDS[kind](index, SAMPLED) for index, kind in enumerate(["good", "late", "ignorant"])]
    pool = VerifierPool(TARGET, SAMPLED, lives=[4])
    await run_steps(pool, panel_of(*drafters), merged, NUM_TOKENS)
    text = [*PROMPT, *TARGET.continuation(PROMPT, SAMPLED, NUM_TOKENS)]
    for drafter in drafters:
        heard = 0
        for delta in drafter.deltas:
            assert delta.start == heard
            assert list(delta.tokens) == text[delta.start : delta.end]
            assert positions_of(delta.features) == list(range(delta.feature_start, delta.end - 1))
            heard = delta.end
        assert len(drafter.deltas) > 1


@asynccontextmanager
async def decoding(drafter: ScriptedDrafter, context: Context) -> AsyncIterator[AsyncGenerator[Step, None]]:
    """With a drafter who has the time to hear what it is asked."""
    panel, policy = Panel([drafter], deadline_s=5.0), Fixed(merged, Ask(num_nodes=4, depth=1))
    async with aclosing(decode(context, VerifierPool(TARGET, GREEDY).open, panel, policy)) as steps:
        yield steps
    await panel.close()


async def test_drafters_are_at_work_while_what_was_decided_is_delivered() -> None:
    drafter, context = good(), Context(SessionState(tuple(PROMPT)), feature_window=8)
    async with decoding(drafter, context) as steps:
        for _ in range(3):
            await anext(steps)
            assert drafter.deltas[-1].end == len(context.tokens)


@pytest.mark.parametrize("end_tokens", [(), (TARGET.continuation(PROMPT, GREEDY, 6)[-1],)])
async def test_nobody_is_asked_for_what_comes_after_the_end(end_tokens: tuple[int, ...]) -> None:
    max_tokens = 1 << 30 if end_tokens else 6
    drafter, state = good(), SessionState(tuple(PROMPT), max_tokens=max_tokens, end_tokens=end_tokens)
    context = Context(state, feature_window=8)
    async with decoding(drafter, context) as steps:
        async for _ in steps:
            if context.is_over:
                break
    assert drafter.deltas[-1].end < len(context.tokens)


async def test_trees_come_in_the_drafters_order_and_each_is_owned_by_its_drafter() -> None:
    trees = await ask_all(panel_of(good(2), good(0), good(1)), mid_answer(), Ask())
    assert [set(tree.owners[1:]) for tree in trees] == [{0b1}, {0b10}, {0b100}]


async def test_a_tree_that_grows_from_another_root_is_left_out() -> None:
    confused = ScriptedDrafter(0, lambda tokens, ask: guesses(0)([*tokens, tokens[-1] + 1], ask))
    trees = await ask_all(panel_of(confused, good(1)), mid_answer(), Ask())
    assert [tree.owners[1] for tree in trees] == [0b10]


async def test_a_drafter_slower_than_the_panels_patience_is_late() -> None:
    never = asyncio.Event()
    slow = ScriptedDrafter(0, foresight(TARGET, GREEDY), wait=never.wait)
    panel = Panel([slow, good(1)], deadline_s=60.0, patience=2.0)
    async with asyncio.timeout(5):
        trees = await ask_all(panel, mid_answer(), Ask(), pass_s=0.001)
    assert [tree.owners[1] for tree in trees] == [0b10]
    await panel.close()


async def test_a_late_drafter_is_left_out_and_asked_again_once_its_answer_has_come() -> None:
    context, gate = mid_answer(), asyncio.Event()
    late = ScriptedDrafter(0, foresight(TARGET, GREEDY), wait=gate.wait)
    panel = panel_of(late, good(1))
    for token in (2, 5):
        trees = await ask_all(panel, context, Ask())
        assert [tree.owners[1] for tree in trees] == [0b10]
        context.extend(make_verdict([token], [len(context.tokens) - 1]))
    assert len(late.deltas) == 1, "it is not asked while it owes an answer"
    gate.set()
    await turns(2)
    trees = await ask_all(panel, context, Ask())
    assert [tree.owners[1] for tree in trees] == [0b1, 0b10]
    assert all(tree.tokens[0] == 5 for tree in trees), "the late answer itself is not used"
    assert late.deltas[1].start == late.deltas[0].end


async def test_a_lost_drafter_leaves_the_panel_and_its_member_call_says_why() -> None:
    panel = panel_of(good(1))
    dying = ScriptedDrafter(0, foresight(TARGET, GREEDY), dies_at=1)
    membership = asyncio.create_task(panel.member(dying))
    await turns(1)
    assert len(await ask_all(panel, mid_answer(), Ask())) == 2
    assert len(await ask_all(panel, mid_answer(), Ask())) == 1
    await turns(1)
    assert isinstance(membership.exception(), PeerGone)
    assert dying not in panel.drafters


async def test_a_drafter_lost_while_its_answer_is_owed_leaves_the_panel_too() -> None:
    gate = asyncio.Event()
    panel = panel_of(good(1))
    dying = ScriptedDrafter(0, foresight(TARGET, GREEDY), wait=gate.wait, dies_at=0)
    membership = asyncio.create_task(panel.member(dying))
    await turns(1)
    assert len(await ask_all(panel, mid_answer(), Ask())) == 1
    gate.set()
    await turns(2)
    assert len(await ask_all(panel, mid_answer(), Ask())) == 1
    await turns(1)
    assert isinstance(membership.exception(), PeerGone)
    assert dying not in panel.drafters


async def test_a_drafter_that_joins_midway_hears_everything_from_the_start() -> None:
    context, panel, joining = mid_answer(), panel_of(good(0)), good(1)
    await ask_all(panel, context, Ask())
    membership = asyncio.create_task(panel.member(joining))
    await turns(1)
    context.extend(make_verdict([2], [len(PROMPT)]))
    assert len(await ask_all(panel, context, Ask())) == 2
    assert list(joining.deltas[0].tokens) == context.tokens
    membership.cancel()
    await turns(1)
    assert joining not in panel.drafters


async def test_closing_the_panel_cancels_the_answers_still_owed() -> None:
    ended: list[str] = []
    panel = panel_of(ScriptedDrafter(0, guesses(0), wait=lambda: forever(ended)))
    await ask_all(panel, mid_answer(), Ask())
    await panel.close()
    assert ended == ["cancelled"]


async def test_a_cancelled_request_leaves_no_drafter_at_work() -> None:
    ended: list[str] = []
    panel = Panel([ScriptedDrafter(0, guesses(0), wait=lambda: forever(ended))], deadline_s=60.0)
    request = asyncio.create_task(ask_all(panel, mid_answer(), Ask()))
    await turns(2)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    await panel.close()
    assert ended == ["cancelled"]


async def test_a_step_tells_where_its_time_went() -> None:
    first, second, *_ = await run_steps(VerifierPool(TARGET, GREEDY), panel_of(good()), single, NUM_TOKENS)
    assert (first.is_prefill, first.draft_ms) == (True, 0.0)
    assert not second.is_prefill
    assert second.draft_ms > 0
    assert second.verify_ms > 0


async def forever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
