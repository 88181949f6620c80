"""The verifier of one request: its answers share a lease, and move together when that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Any

import pytest

from deployments.leasing import Handler
from deployments.linking import LinkPool
from deployments.messages import Message
from deployments.verifiers import RequestVerifier
from taps.peers import PeerBusy, PeerGone
from tests.fakes import until
from tests.replicas import PATIENCE_S, FakeHandle, running
from tests.test_sessions import table


@asynccontextmanager
async def verifier_of(handle: Any, answers: int, conversation: str = "") -> AsyncIterator[RequestVerifier]:
    verifier = RequestVerifier(LinkPool(), handle, conversation, answers, PATIENCE_S, PATIENCE_S)
    try:
        yield verifier
    finally:
        await verifier.close()


async def lose(verifier: RequestVerifier) -> None:
    """A session whose verifier goes."""
    async with verifier.session():
        raise PeerGone("no sign of life")


async def test_the_answers_of_a_request_share_one_lease() -> None:
    hellos: list[Message] = []

    def noting(hello: Message) -> Handler:
        hellos.append(hello)
        return table(hello)

    async with running(noting) as (replica,):
        async with verifier_of(replica.handle, 3) as verifier:

            async def hold(done: asyncio.Event) -> None:
                async with verifier.session():
                    await done.wait()

            done = asyncio.Event()
            tasks = [asyncio.create_task(hold(done)) for _ in range(3)]
            await until(lambda: replica.open == 3)
            assert replica.server.num_leases == len(replica.handle.leases) == 1
            done.set()
            await asyncio.gather(*tasks)
        await replica.until_free()
    assert sorted(hello["beside"] for hello in hellos) == [False, True, True], "one of them has a place"


async def test_after_a_loss_they_share_another_one() -> None:
    async with running(table, table) as replicas:
        handle = FakeHandle(*(replica.server for replica in replicas))
        handle.turns = cycle([0, 1])
        async with verifier_of(handle, 2) as verifier:
            async with verifier.session():
                with pytest.raises(PeerGone):
                    await lose(verifier)
                async with verifier.session(), verifier.session():
                    assert [replica.open for replica in replicas] == [1, 2]
            assert len(handle.leases) == 2
            # The lost one is given back once nothing runs on it.
            await replicas[0].until_free()
            assert replicas[1].server.num_leases == 1
        await replicas[1].until_free()


async def test_who_cannot_be_leased_is_asked_for_again() -> None:
    async with running(table) as (replica,):
        handle: Any = FakeHandle()
        verifier = RequestVerifier(LinkPool(), handle, "", 2, 0.05, PATIENCE_S)
        with pytest.raises(PeerBusy):
            async with verifier.session():
                pytest.fail("nobody is there")
        handle.servers.append(replica.server)
        async with verifier.session():
            assert replica.open == 1
        await verifier.close()
        await replica.until_free()


async def test_a_conversation_is_led_to_the_same_verifier() -> None:
    async with (
        running(table) as (replica,),
        verifier_of(replica.handle, 2, "mine") as verifier,
        verifier.session(),
        verifier.session(),
    ):
        assert replica.handle.session_ids == ["mine/0"]


async def test_the_next_one_computes_the_same_bits_where_there_is_one() -> None:
    async with running(table, table, table) as replicas:
        for replica, numerics in zip(replicas, ("a", "b", "a"), strict=True):
            replica.server._numerics = numerics
        handle = FakeHandle(*(replica.server for replica in replicas))
        handle.turns = iter([0, 1, 2])
        async with verifier_of(handle, 1) as verifier:
            with pytest.raises(PeerGone):
                await lose(verifier)
            async with verifier.session() as session:
                assert session.numerics == "a"
                assert [replica.open for replica in replicas] == [0, 0, 1]
