"""One generation on leased replicas: whatever befalls them, the text is the target's and every lease ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from deployments.config import RouterArgs
from deployments.directory import Specialist
from deployments.generation import Generator
from deployments.leasing import Handler
from deployments.messages import Message
from deployments.requests import Generation
from deployments.sessions import answering_drafter, answering_verifier
from taps.decoding import loop
from taps.decoding.policy import Step
from taps.drafting.drafter import Ask
from taps.peers import PeerBusy, PeerGone
from taps.session import SessionState
from taps.shaping import SamplingParams
from tests.fakes import PROMPT, ScriptedDrafter, TableTarget, TableVerifier, foresight, until
from tests.replicas import PATIENCE_S, Replica, running

TARGET = TableTarget()
PARAMS = SamplingParams(temperature=1.0, seed=21)
NEW_TOKENS = 24
PLAIN = TARGET.continuation(PROMPT, PARAMS, NEW_TOKENS)
ARGS = RouterArgs(lease_deadline_s=PATIENCE_S, verify_deadline_s=PATIENCE_S, propose_patience=1e6)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.01)
    monkeypatch.setattr("deployments.generation._REJOIN_DELAY_S", 0.01)


def verifier(hello: Message) -> Handler:
    return answering_verifier(TableVerifier(TARGET))


def lost_after(passes: int) -> Callable[[Message], Handler]:
    """A verifier that every session loses after so many passes."""
    return lambda hello: answering_verifier(TableVerifier(TARGET, lives=passes))


def drafter(_: Message) -> Handler:
    return answering_drafter(ScriptedDrafter(0, foresight(TARGET, PARAMS)))


def job(*drafters: str) -> Generation:
    ask = Ask(num_nodes=6, depth=2, top_k=2)
    return Generation(SessionState(PROMPT, 0, PARAMS, NEW_TOKENS), (), "merged", drafters, ask)


def specialists(**replicas: Replica) -> dict[str, Specialist]:
    return {name: Specialist(name, name, replica.handle) for name, replica in replicas.items()}


def tokens_of(steps: Sequence[Step]) -> list[int]:
    return [token for step in steps for token in step.verdict.tokens][:NEW_TOKENS]


@asynccontextmanager
async def alone(
    generator: Generator, asked: Generation, there: dict[str, Specialist]
) -> AsyncIterator[AsyncGenerator[Step, None]]:
    """The steps of a request's only answer."""
    async with (
        generator.verifier([asked]) as shared,
        aclosing(generator.steps(asked, there, shared)) as generated,
    ):
        yield generated


async def steps_of(
    generator: Generator, asked: Generation, there: dict[str, Specialist],
    meanwhile: Callable[[Step, int], Awaitable[None]] | None = None,
) -> list[Step]:  # fmt: skip
    """Steps until there are enough tokens. Args: meanwhile: told each step, and its number."""
    steps: list[Step] = []
    async with asyncio.timeout(30), alone(generator, asked, there) as generated:
        async for step in generated:
            steps.append(step)
            if meanwhile is not None:
                await meanwhile(step, len(steps))
            if len(tokens_of(steps)) >= NEW_TOKENS:
                break
    return steps


async def test_the_text_is_the_targets_and_drafters_make_it_quick() -> None:
    async with running(verifier, drafter, drafter) as (target, math, chat):
        generator = Generator(target.handle, ARGS)
        plain = await steps_of(generator, job(), {})
        # Drafters join beside the prefill: at the latest when the first of them was leased.
        both = await steps_of(generator, job("math", "chat"), specialists(math=math, chat=chat))
        assert tokens_of(plain) == tokens_of(both) == PLAIN
        assert len(both) < len(plain)
        for replica in (target, math, chat):
            await replica.until_free()


async def test_when_the_verifier_is_lost_another_goes_on_with_the_same_text() -> None:
    async with running(lost_after(4), verifier, drafter) as (dying, heir, math):
        generator = Generator(dying.handle, ARGS)

        async def serve_notices(step: Step, number: int) -> None:
            dying.handle.servers[:] = [dying.server if number < 4 else heir.server]

        steps = await steps_of(generator, job("math"), specialists(math=math), serve_notices)
        assert tokens_of(steps) == PLAIN
        assert sum(step.is_prefill for step in steps) > 1
        for replica in (dying, heir, math):
            await replica.until_free()


@pytest.mark.parametrize(("turns", "heir"), [([0, 1, 1, 2], 2), ([0, 2], 2), ([0, 1, 1, 1, 1], 1)])
async def test_an_answer_goes_on_where_bits_are_the_same_if_it_can(turns: list[int], heir: int) -> None:
    async with running(lost_after(4), verifier, verifier) as replicas:
        for replica, numerics in zip(replicas, ("a", "b", "a"), strict=True):
            replica.server._numerics = numerics
        handle = replicas[0].handle
        handle.servers[:], handle.turns = [replica.server for replica in replicas], iter(turns)
        steps = await steps_of(Generator(handle, ARGS), job(), {})
        assert tokens_of(steps) == PLAIN
        assert [step.numerics for step in steps if step.is_prefill] == ["a", "ab"[heir == 1]]
        for replica in replicas:
            await replica.until_free()


async def test_a_killed_drafter_is_left_out_and_another_replica_of_it_joins() -> None:
    async with running(verifier, drafter, drafter) as (target, first, second):

        async def kill(number: int) -> None:
            if number == 3:
                await until(first.opened.is_set)
                first.handle.servers[:] = [second.server]
                await first.server.stop()
            if number == 5:
                await until(second.opened.is_set)

        there = specialists(math=first)
        generator = Generator(target.handle, ARGS)
        steps = await steps_of(generator, job("math"), there, lambda _, number: kill(number))
        assert tokens_of(steps) == PLAIN
        await target.until_free()
        await second.until_free()


async def test_a_specialist_that_is_not_there_is_not_waited_for() -> None:
    async with running(verifier, drafter) as (target, math):
        math.handle.servers.clear()
        steps = await steps_of(Generator(target.handle, ARGS), job("math", "code"), specialists(math=math))
        assert tokens_of(steps) == PLAIN
        assert all(step.draft_ms < 500 for step in steps)


async def test_an_answer_that_waits_for_its_verifier_holds_no_drafter() -> None:
    async with running(verifier, drafter) as (target, math):
        target.handle.servers.clear()
        args = ARGS.model_copy(update={"lease_deadline_s": 0.2})
        with pytest.raises(PeerBusy):
            await steps_of(Generator(target.handle, args), job("math"), specialists(math=math))
        assert math.handle.leases == []


async def test_a_verifier_that_no_replica_can_replace_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.0)
    async with running(lost_after(1), drafter) as (dying, math):
        with pytest.raises(PeerGone, match="lost"):
            await steps_of(Generator(dying.handle, ARGS), job("math"), specialists(math=math))
        await dying.until_free()
        await math.until_free()


@pytest.mark.parametrize("after", [1, 2, 5])
async def test_closing_an_answer_frees_everything_it_held(after: int) -> None:
    async with running(verifier, drafter) as (target, math):
        generator = Generator(target.handle, ARGS)
        async with alone(generator, job("math"), specialists(math=math)) as generated:
            for _ in range(after):
                await anext(generated)
        await target.until_free()
        await math.until_free()


async def test_cancelling_an_answer_frees_everything_it_held() -> None:
    async with running(verifier, drafter) as (target, math):
        generator = Generator(target.handle, ARGS)

        async def endless() -> None:
            async with alone(generator, job("math"), specialists(math=math)) as generated:
                async for _ in generated:
                    pass

        task = asyncio.create_task(endless())
        await until(lambda: target.open == 1 and math.open == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await target.until_free()
        await math.until_free()


async def test_a_conversation_is_leased_by_its_name_and_other_replicas_by_others() -> None:
    async with running(lost_after(4), verifier) as replicas:
        handle = replicas[0].handle
        handle.servers[:], handle.turns = [replica.server for replica in replicas], iter([0, 1])
        steps = await steps_of(Generator(handle, ARGS), replace(job(), conversation="a"), {})
        assert tokens_of(steps) == PLAIN
        assert handle.session_ids == ["a/0", "a/0"]
        for replica in replicas:
            await replica.until_free()
