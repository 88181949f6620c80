"""Lease and stream end together, whoever goes first, and everything a session held is freed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from deployments import channel
from deployments.channel import ChannelPool, Handler
from deployments.messages import Message, RemoteError
from taps.models.cache import CacheFull
from taps.peers import PeerBusy, PeerGone
from tests import replicas
from tests.fakes import until
from tests.replicas import PATIENCE_S, FakeHandle, Replica


async def echo(message: Message) -> Message:
    if message.get("fail"):
        raise CacheFull("as asked")
    return {"echo": message["text"]}


async def silence(_: Message) -> Message:
    await asyncio.Event().wait()
    raise AssertionError("never reached")


@asynccontextmanager
async def running(answer: Handler) -> AsyncIterator[Replica]:
    """One replica whose sessions all answer alike."""
    async with replicas.running(lambda hello: answer) as (replica,):
        yield replica


async def ask_in_vain(replica: Replica) -> None:
    async with ChannelPool().session(replica.handle, {}, PATIENCE_S) as stream:
        await stream.ask({"text": "hello?"}, 60.0)


async def test_a_session_answers_and_its_end_frees_the_far_side() -> None:
    async with running(echo) as replica:
        pool = ChannelPool()
        async with pool.session(replica.handle, {}, PATIENCE_S) as stream:
            assert (await stream.ask({"text": "one"}, PATIENCE_S))["echo"] == "one"
            assert (await stream.ask({"text": "two"}, PATIENCE_S))["echo"] == "two"
            assert replica.open == 1
        await replica.until_free()
        assert not pool._channels, "the channel goes with its last session"


async def test_an_error_travels_by_type_and_the_session_goes_on() -> None:
    async with running(echo) as replica, ChannelPool().session(replica.handle, {}, PATIENCE_S) as stream:
        with pytest.raises(CacheFull, match="as asked"):
            await stream.ask({"fail": True}, PATIENCE_S)
        assert (await stream.ask({"text": "still here"}, PATIENCE_S))["echo"] == "still here"


async def test_a_session_that_cannot_be_opened_says_why() -> None:
    async with running(echo) as replica:
        with pytest.raises(CacheFull, match="no slot"):
            async with ChannelPool().session(replica.handle, {"refuse": True}, PATIENCE_S):
                pytest.fail("must not open")
        await replica.until_free()


async def test_a_peer_that_does_not_answer_is_gone_and_forgets_the_session() -> None:
    async with running(silence) as replica:
        with pytest.raises(PeerGone, match=r"no sign of life for 0\.2 s"):
            async with ChannelPool().session(replica.handle, {}, PATIENCE_S) as stream:
                await stream.ask({"text": "hello?"}, 0.2)
        await replica.until_free()


async def slowly(message: Message) -> Message:
    await asyncio.sleep(0.3)
    return {"echo": message["text"]}


async def test_a_slow_peer_that_is_at_work_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a long prefill that waits behind others."""
    monkeypatch.setattr(channel, "_SIGN_OF_LIFE_S", 0.02)
    async with running(slowly) as replica, ChannelPool().session(replica.handle, {}, PATIENCE_S) as stream:
        assert (await stream.ask({"text": "in the end"}, 0.15))["echo"] == "in the end"
        assert (await stream.ask({"text": "again"}, 0.15))["echo"] == "again"


async def test_a_replica_that_can_do_no_more_says_so_instead_of_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "_SIGN_OF_LIFE_S", 0.02)

    def check() -> None:
        raise RuntimeError("a step runs for 100 s")

    async with running(silence) as replica:
        monkeypatch.setattr(replica.server, "_check", check)
        with pytest.raises(PeerGone, match="a step runs for 100 s"):
            await asyncio.wait_for(ask_in_vain(replica), PATIENCE_S)
        await replica.until_free()


@pytest.mark.parametrize("turns", range(12))
async def test_the_end_of_the_lease_ends_the_stream_at_once(turns: int) -> None:
    """As when Serve stops a replica, at any moment: the caller must not wait for its own deadline."""
    async with running(silence) as replica:
        task = asyncio.create_task(ask_in_vain(replica))
        async with asyncio.timeout(PATIENCE_S):
            await replica.opened.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        replica.handle.leases[0].cancel()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(task, PATIENCE_S)
        await replica.until_free()


async def test_no_lease_in_time_is_told_from_a_lost_replica() -> None:
    async with running(echo) as replica:

        class Crowded(FakeHandle):
            def remote(self) -> Any:
                return self

            async def __anext__(self) -> Message:
                return await silence({})

            def cancel(self) -> None:
                pass

        with pytest.raises(PeerBusy, match="no replica was free"):
            async with ChannelPool().session(cast(Any, Crowded(replica.server)), {}, 0.05):
                raise AssertionError("never reached")


async def test_an_unexpected_error_is_logged_where_it_happened(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: Message) -> Message:
        raise ZeroDivisionError("as made")

    async with running(broken) as replica:
        async with ChannelPool().session(replica.handle, {}, PATIENCE_S) as stream:
            with pytest.raises(RemoteError, match="ZeroDivisionError: as made"):
                await stream.ask({}, PATIENCE_S)
        await replica.until_free()
    (record,) = caplog.records
    assert record.exc_info is not None


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    async with running(silence) as replica:
        task = asyncio.create_task(ask_in_vain(replica))
        await until(lambda: replica.open == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await replica.until_free()


async def test_a_lease_nobody_connects_to_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_CONNECT_DEADLINE_S", 0.05)
    async with running(echo) as replica:
        lease = replica.handle.remote()
        await anext(lease)
        async with asyncio.timeout(PATIENCE_S):
            await lease.finish()
        assert replica.server.num_sessions == 0


async def test_a_stream_without_a_lease_is_refused() -> None:
    async with running(echo) as replica:

        class Stranger:
            def options(self, stream: bool) -> Any:
                return self

            @property
            def lease(self) -> Any:
                return self

            def remote(self) -> Any:
                return self

            async def __anext__(self) -> Message:
                return {"endpoint": replica.server._endpoint, "secret": "guessed"}

            def cancel(self) -> None:
                pass

        stranger: Any = Stranger()
        with pytest.raises(PeerGone):
            async with ChannelPool().session(stranger, {}, PATIENCE_S):
                pytest.fail("must not open")
        assert replica.open == 0
