"""Plain decoding runs ahead of its reader, within its window, and stops where it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
import torch

from taps.adaptive.lookups import Lookups
from taps.engine.ahead import Looks, RunsAhead
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.lookup import Lookup
from taps.models.causal_lm import CausalLM
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from taps.verdict import Verdict
from tests.fakes import make_verdict, until
from tests.tiny import tiny_target


class Source:
    """Decides 0, 1, 2, ... at once, or one each time `gate` is released; fails at `fails_at`, once."""

    def __init__(self, over_at: int = 1 << 30, fails_at: int | None = None, gated: bool = False) -> None:
        self.count = 0
        self.gate = asyncio.Semaphore(0)
        self.cancelled = False
        self._over_at, self._fails_at, self._gated = over_at, fails_at, gated
        self.run = RunsAhead(self._decide, lambda: self.count >= self._over_at)

    async def _decide(self) -> Verdict:
        try:
            await (self.gate.acquire() if self._gated else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.count == self._fails_at:
            self._fails_at = None
            raise ValueError("as asked")
        self.count += 1
        return make_verdict([self.count - 1], [self.count])


def told(verdicts: Sequence[Verdict]) -> tuple[int, ...]:
    return tuple(token for verdict in verdicts for token in verdict.tokens)


async def settled(condition: Callable[[], bool]) -> None:
    """Until it holds, and a while longer: it must go on holding."""
    await until(condition)
    for _ in range(20):
        await asyncio.sleep(0)
    assert condition()


def test_a_session_whose_looks_have_no_use_looks_now_and_then() -> None:
    looks, looked = Looks(), []
    for number in range(24):
        looked.append(looks.now())
        if looked[-1]:
            looks.took(has_use=number == 15)
    assert looked == [True] * 4 + [False, False, False, True] * 3 + [True] * 4 + [False, False, False, True]


async def test_it_goes_on_up_to_its_window_while_nobody_reads() -> None:
    source = Source()
    assert told(await source.run.fetch(4)) == (0,)
    await settled(lambda: source.count == 5)
    (fetched,) = await source.run.fetch(4)
    assert fetched.tokens == (1, 2, 3, 4)
    assert fetched.num_passes == 4
    assert len(fetched.features) == 0
    await settled(lambda: source.count == 9)


async def test_a_window_of_nothing_stops_it_after_the_pass_under_way() -> None:
    source = Source(gated=True)
    source.gate.release()
    assert told(await source.run.fetch(4)) == (0,)
    stopping = asyncio.create_task(source.run.fetch(0))
    await asyncio.sleep(0)
    source.gate.release()
    source.gate.release()
    assert told(await stopping) == (1,)
    await settled(lambda: source.count == 2)
    assert told(await source.run.fetch(0)) == ()
    assert told(await source.run.fetch(1)) == (2,)


@pytest.mark.parametrize("window", [1, 3, 16])
async def test_it_ends_with_the_text_and_then_decides_what_is_asked_for_alone(window: int) -> None:
    source = Source(over_at=5)
    tokens: list[int] = []
    while len(tokens) < 5:
        tokens += told(await source.run.fetch(window))
    assert tokens == [0, 1, 2, 3, 4]
    await settled(lambda: source.count == 5)
    assert told(await source.run.fetch(window)) == (5,)
    await settled(lambda: source.count == 6)


async def test_what_was_decided_before_a_failure_is_told_first() -> None:
    source = Source(fails_at=2)
    assert told(await source.run.fetch(4)) == (0,)
    await settled(lambda: source.count == 2)
    assert told(await source.run.fetch(4)) == (1,)
    with pytest.raises(ValueError, match="as asked"):
        await source.run.fetch(4)
    assert told(await source.run.fetch(4)) == (2,)


async def test_a_failure_of_the_first_pass_is_raised() -> None:
    source = Source(fails_at=0)
    with pytest.raises(ValueError, match="as asked"):
        await source.run.fetch(4)


async def test_closing_ends_the_pass_under_way() -> None:
    source = Source(gated=True)
    source.gate.release()
    await source.run.fetch(4)
    await asyncio.sleep(0)
    await source.run.close()
    assert source.cancelled


async def test_drafting_resumes_where_plain_decoding_stopped_and_the_text_is_one() -> None:
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 2, 128))
    prompt = SessionState((5, 6, 7), max_tokens=60)
    async with verifier.session() as session:
        first = await session.prefill(prompt, 8)
        expected, seen = list(first.tokens), [first.features]
        while len(expected) < 60:
            verdict = await session.verify(ProposalTree.root_only(expected[-1]))
            expected += verdict.tokens
            seen.append(verdict.features)
        features = torch.cat(seen)  # of every position
    async with verifier.session() as session:
        tokens, known = list((await session.prefill(prompt, 8)).tokens), 1
        for window in (3, 5, 16):
            for _ in range(3):
                (verdict,) = await session.ahead(window)
                assert (len(verdict.features), len(verdict.tokens)) == (0, verdict.num_passes)
                tokens += verdict.tokens
            (stopped,) = await session.ahead(0)
            tokens += stopped.tokens
            untold = len(tokens) - known
            known = len(tokens) + 2
            assert torch.equal(
                stopped.features,
                features[len(prompt.tokens) + len(tokens) - 1 - min(untold, 8) :][: min(untold, 8)],
            )
            tree = ProposalTree.ordered(tokens[-1], [(expected[len(tokens)], 0, -0.1, 1)], 2)
            verdict = await session.verify(tree)
            assert len(verdict.tokens) == 2
            tokens += verdict.tokens
        while len(tokens) < 60:
            tokens += told(await session.ahead(16))
        assert tokens == expected
    verifier.close()


@pytest.mark.parametrize("window", [8, 100])
async def test_what_a_prefill_does_not_tell_comes_with_the_stop(window: int) -> None:
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 2, 128))
    prompt = SessionState(tuple(range(5, 35)), max_tokens=60)
    async with verifier.session() as session, verifier.session() as other:
        first, told_all = await session.prefill(prompt, window, tells=False), await other.prefill(prompt, 100)
        assert len(first.features) == 0
        (at_once,) = await session.ahead(0)
        assert at_once.tokens == ()
        assert torch.equal(at_once.features, told_all.features[-window:])
    async with verifier.session() as session, verifier.session() as other:
        tokens = [*(await session.prefill(prompt, window, tells=False)).tokens]
        expected, seen = list(tokens), [(await other.prefill(prompt, 100)).features]
        while len(tokens) < 10:
            tokens += told(await session.ahead(4))
        (*_, stopped) = await session.ahead(0)
        tokens += stopped.tokens
        while len(expected) < len(tokens):
            verdict = await other.verify(ProposalTree.root_only(expected[-1]))
            expected += verdict.tokens
            seen.append(verdict.features)
        assert tokens == expected
        assert torch.equal(stopped.features, torch.cat(seen)[-window:])
        verdict = await session.verify(ProposalTree.root_only(tokens[-1]))
        assert len(verdict.features) == 1
    verifier.close()


async def test_a_session_whose_owner_wants_no_features_gets_none() -> None:
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 1, 128))
    async with verifier.session() as session:
        assert len((await session.prefill(SessionState((5, 6, 7)), 0)).features) == 0
        assert [len(verdict.features) for verdict in await session.ahead(4)] == [0]
    verifier.close()


@pytest.mark.parametrize("sampling", [SamplingParams(0.0), SamplingParams(0.7, seed=3)])
async def test_what_its_own_text_says_comes_next_is_drafted_and_changes_no_token(
    sampling: SamplingParams,
) -> None:
    """A text that repeats itself, beside a session that looks nothing up; windows smaller than drafts, too."""
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 4, 512), guesser=Lookups())
    prompt = SessionState((5, 6, 7, 8) * 8, max_tokens=200, sampling=sampling)

    async def decoded(lookup: Lookup | None, window: int) -> list[Verdict]:
        async with verifier.session() as session:
            found = [await session.prefill(prompt, 8)]
            while len(told(found)) < 200:
                found += await session.ahead(window, lookup)
            return found

    plain, *others = await asyncio.gather(
        decoded(None, 16), decoded(Lookup(3), 16), decoded(Lookup(3), 1), decoded(Lookup(3, num_tokens=1), 16)
    )
    assert len(told(plain)) == 200
    for found in others:
        assert told(found) == told(plain)
        drafted = [verdict for verdict in found if verdict.num_nodes]
        assert all(verdict.num_passes == 1 for verdict in drafted)
        assert {owners for verdict in drafted for owners in verdict.owners} <= {1 << 3}
        if sampling.greedy:
            assert sum(verdict.num_passes for verdict in found[1:]) < 150, "a text that repeats itself"
    assert not any(verdict.num_nodes for verdict in plain)
    verifier.close()


async def test_features_of_drafted_passes_come_with_the_stop_too() -> None:
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 2, 512), guesser=Lookups())
    prompt = SessionState((5, 6, 7, 8) * 8, max_tokens=100)
    async with verifier.session() as session, verifier.session() as other:
        tokens = [*(await session.prefill(prompt, 100)).tokens]
        first = await other.prefill(prompt, 100)
        while len(tokens) < 60:
            tokens += told(await session.ahead(16, Lookup(0)))
        stopped = await session.ahead(0)
        tokens += told(stopped)
        expected, seen = list(first.tokens), list[torch.Tensor]()
        while len(expected) < len(tokens):
            verdict = await other.verify(ProposalTree.root_only(expected[-1]))
            expected += verdict.tokens
            seen.append(verdict.features)
        assert tokens == expected
        assert torch.equal(stopped[-1].features, torch.cat(seen))
    verifier.close()
