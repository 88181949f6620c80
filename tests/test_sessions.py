"""Remote sessions: what the loop asks of a replica is what it would have asked in its own process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

import pytest
import torch

from deployments.leasing import Handler
from deployments.linking import LinkPool
from deployments.messages import Message, RemoteError
from deployments.sessions import (
    RemoteVerifierSession,
    answering_drafter,
    answering_verifier,
    drafter_session,
)
from deployments.verifiers import RequestVerifier
from taps.context import ContextDelta
from taps.drafting.drafter import Ask, InvalidAsk
from taps.peers import PeerBusy, PeerGone
from taps.sampling import InvalidLogits
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import PromptTooLong
from tests.fakes import PROMPT, ScriptedDrafter, TableTarget, TableVerifier, chain, foresight, positions_of
from tests.replicas import PATIENCE_S, Replica, running

TARGET = TableTarget()
PARAMS = SamplingParams(temperature=0.9, seed=7)


def table(hello: Message) -> Handler:
    return answering_verifier(TableVerifier(TARGET))


def scripted(_: Message) -> Handler:
    return answering_drafter(ScriptedDrafter(0, foresight(TARGET, PARAMS)))


def failing(error: Exception) -> Handler:
    async def answer(_: Message) -> Message:
        raise error

    return answer


@asynccontextmanager
async def verifying(replica: Replica) -> AsyncIterator[RemoteVerifierSession]:
    verifier = RequestVerifier(LinkPool(), replica.handle, "", 1, PATIENCE_S, PATIENCE_S)
    try:
        async with verifier.session() as session:
            yield session
    finally:
        await verifier.close()


async def test_a_remote_verifier_decides_what_a_local_one_does() -> None:
    local = TableVerifier(TARGET)
    async with running(table) as (replica,), verifying(replica) as remote:
        state = SessionState(tuple(PROMPT), sampling=PARAMS)
        ours, theirs = await remote.prefill(state, 3, False), await local.prefill(state, 3, False)
        assert not len(ours.features)
        (told,) = await remote.ahead(0)
        assert len(told.features) == 3
        ours, theirs = await remote.prefill(state, 3), await local.prefill(state, 3)
        for _ in range(5):
            assert (ours.tokens, ours.owners) == (theirs.tokens, theirs.owners)
            assert torch.equal(ours.features, theirs.features)
            tree = chain(1, 2, 3, root=ours.tokens[-1])
            ours, theirs = await remote.verify(tree), await local.verify(tree)
    await replica.until_free()


async def test_a_resumed_prefill_says_how_much_was_generated() -> None:
    params = SamplingParams(temperature=0.9, frequency_penalty=2.0, seed=7)
    tokens = [*PROMPT, *TARGET.continuation(PROMPT, params, 4)]
    async with running(table) as (replica,), verifying(replica) as remote:
        verdict = await remote.prefill(SessionState(tuple(tokens), 4, params), 2)
    assert [*tokens[len(PROMPT) :], *verdict.tokens] == TARGET.continuation(PROMPT, params, 5)
    assert positions_of(verdict.features) == [len(tokens) - 2, len(tokens) - 1]


async def test_a_remote_drafter_proposes_what_a_local_one_does() -> None:
    news = ContextDelta(0, PROMPT, 0, torch.zeros(len(PROMPT) - 1, 1))
    ask = Ask(num_nodes=5, depth=2)
    async with running(scripted) as (replica,):
        waits = PATIENCE_S, PATIENCE_S
        async with drafter_session(LinkPool(), replica.handle, "math", 3, *waits) as remote:
            assert (remote.name, remote.index) == ("math", 3)
            tree = await remote.propose(news, ask)
    assert tree == await ScriptedDrafter(0, foresight(TARGET, PARAMS)).propose(news, ask)


@pytest.mark.parametrize("error", [PromptTooLong("too long"), InvalidLogits("NaN")])
async def test_what_any_verifier_would_answer_reaches_the_caller(error: Exception) -> None:
    async with running(lambda _: failing(error)) as (replica,), verifying(replica) as remote:
        with pytest.raises(type(error)):
            await remote.verify(ProposalTree.root_only(1))


async def test_an_error_of_the_replica_alone_loses_it() -> None:
    async with running(lambda _: failing(KeyError("bug"))) as (replica,), verifying(replica) as remote:
        with pytest.raises(PeerGone, match="KeyError") as caught:
            await remote.verify(ProposalTree.root_only(1))
    assert isinstance(caught.value, RemoteError)


ERRORS = [PromptTooLong("x"), InvalidTree("x"), InvalidLogits("x"), InvalidAsk("x"), ValueError("x")]


@pytest.mark.parametrize("error", ERRORS)
async def test_a_drafter_that_fails_in_any_way_is_gone(error: Exception) -> None:
    async with running(lambda _: failing(error)) as (replica,):
        waits = PATIENCE_S, PATIENCE_S
        async with drafter_session(LinkPool(), replica.handle, "math", 0, *waits) as remote:
            with pytest.raises(PeerGone, match="x"):
                await remote.propose(ContextDelta(0, PROMPT, 0, torch.zeros(4, 1)), Ask())


async def test_without_a_free_replica_the_peer_is_busy() -> None:
    async with running(table) as (replica,):
        replica.handle.servers.clear()
        pool, waits = LinkPool(), (0.1, 1.0)
        with pytest.raises(PeerBusy, match="no replica was free"):
            await RequestVerifier(pool, replica.handle, "", 1, *waits).session().__aenter__()
        with pytest.raises(PeerBusy, match="no replica was free"):
            await drafter_session(pool, replica.handle, "math", 0, *waits).__aenter__()


async def test_a_cache_without_room_is_busy() -> None:
    async with running(table) as (replica,):
        with pytest.raises(PeerBusy, match="no slot"):
            async with LinkPool().session(
                replica.handle, {"refuse": True, "sampling": asdict(PARAMS)}, PATIENCE_S
            ):
                pytest.fail("must not open")
