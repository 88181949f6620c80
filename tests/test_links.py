"""Lease and session end together, whoever goes first, a link with all of them, and what they held is freed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import msgpack
import pytest

from deployments import leasing, link, messages
from deployments.leasing import Handler
from deployments.linking import Lease, LinkPool
from deployments.messages import Entry, Message, RemoteError
from taps.models.cache import CacheFull
from taps.peers import PeerBusy, PeerGone
from tests import replicas
from tests.fakes import until
from tests.replicas import PATIENCE_S, FakeHandle, GrantedHandle, Replica


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


async def ask_in_vain(replica: Replica, pool: LinkPool | None = None) -> None:
    async with (pool or LinkPool()).session(replica.handle, {}, PATIENCE_S) as stream:
        await stream.ask({"text": "hello?"}, 60.0)


async def test_a_session_answers_and_its_end_frees_the_far_side() -> None:
    async with running(echo) as replica:
        pool = LinkPool()
        async with pool.session(replica.handle, {}, PATIENCE_S) as stream:
            assert (await stream.ask({"text": "one"}, PATIENCE_S))["echo"] == "one"
            assert (await stream.ask({"text": "two"}, PATIENCE_S))["echo"] == "two"
            assert replica.open == 1
        await replica.until_free()


async def test_an_error_travels_by_type_and_the_session_goes_on() -> None:
    async with running(echo) as replica, LinkPool().session(replica.handle, {}, PATIENCE_S) as stream:
        with pytest.raises(CacheFull, match="as asked"):
            await stream.ask({"fail": True}, PATIENCE_S)
        assert (await stream.ask({"text": "still here"}, PATIENCE_S))["echo"] == "still here"


async def test_a_session_that_cannot_be_opened_says_why() -> None:
    async with running(echo) as replica:
        with pytest.raises(CacheFull, match="no slot"):
            async with LinkPool().session(replica.handle, {"refuse": True}, PATIENCE_S):
                pytest.fail("must not open")
        await replica.until_free()


async def test_a_peer_that_does_not_answer_is_gone_and_forgets_the_session() -> None:
    async with running(silence) as replica:
        with pytest.raises(PeerGone, match=r"no sign of life for 0\.2 s"):
            async with LinkPool().session(replica.handle, {}, PATIENCE_S) as stream:
                await stream.ask({"text": "hello?"}, 0.2)
        await replica.until_free()


async def slowly(message: Message) -> Message:
    await asyncio.sleep(0.3)
    return {"echo": message["text"]}


async def test_a_slow_peer_that_is_at_work_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a long prefill that waits behind others."""
    monkeypatch.setattr(leasing, "_SIGN_OF_LIFE_S", 0.02)
    async with running(slowly) as replica, LinkPool().session(replica.handle, {}, PATIENCE_S) as stream:
        assert (await stream.ask({"text": "in the end"}, 0.15))["echo"] == "in the end"
        assert (await stream.ask({"text": "again"}, 0.15))["echo"] == "again"


async def test_a_replica_that_can_do_no_more_says_so_instead_of_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leasing, "_SIGN_OF_LIFE_S", 0.02)

    def check() -> None:
        raise RuntimeError("a step runs for 100 s")

    async with running(silence) as replica:
        monkeypatch.setattr(replica.server, "check", check)
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
            async with LinkPool().session(cast(Any, Crowded(replica.server)), {}, 0.05):
                raise AssertionError("never reached")


async def test_an_unexpected_error_is_logged_where_it_happened(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_: Message) -> Message:
        raise ZeroDivisionError("as made")

    async with running(broken) as replica:
        async with LinkPool().session(replica.handle, {}, PATIENCE_S) as stream:
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
    monkeypatch.setattr(leasing, "_CONNECT_DEADLINE_S", 0.05)
    async with running(echo) as replica:
        lease = replica.handle.remote()
        await anext(lease)
        async with asyncio.timeout(PATIENCE_S):
            await lease.finish()
        assert replica.server.num_leases == 0


async def test_sessions_of_one_lease_end_it_together() -> None:
    async with running(echo) as replica:
        pool = LinkPool()
        async with pool.lease(replica.handle, PATIENCE_S) as lease:
            over = asyncio.create_task(replica.handle.leases[0].finish())
            async with lease.session({}, 3), lease.session({}, 3) as second:
                assert (replica.open, replica.server.num_leases) == (2, 1)
            assert replica.open == 0
            with pytest.raises(PeerGone, match="ended"):
                await second.ask({"text": "late"}, PATIENCE_S)
            async with lease.session({}, 3) as third:
                assert (await third.ask({"text": "in time"}, PATIENCE_S))["echo"] == "in time"
            await asyncio.wait_for(over, PATIENCE_S)
            with pytest.raises(PeerGone, match="no such lease"):
                async with lease.session({}, 3):
                    pytest.fail("all were taken")
        assert len(replica.handle.leases) == 1


async def test_a_lease_has_no_more_sessions_than_its_first_said() -> None:
    async with (
        running(echo) as replica,
        LinkPool().lease(replica.handle, PATIENCE_S) as lease,
        lease.session({}, 1),
    ):
        with pytest.raises(PeerGone, match="no such lease"):
            async with lease.session({}, 5):
                pytest.fail("must not open")


async def test_a_lease_whose_next_session_nobody_opens_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "_CONNECT_DEADLINE_S", 0.05)
    async with running(echo) as replica:
        lease = replica.handle.remote()
        granted = await anext(lease)
        over = asyncio.create_task(lease.finish())
        async with Lease(LinkPool(), granted, PATIENCE_S).session({}, 2):
            await asyncio.sleep(0.2)
            assert not over.done()
        await asyncio.wait_for(over, PATIENCE_S)


async def test_the_end_of_a_lease_ends_all_its_sessions() -> None:
    async with running(silence) as replica:
        pool = LinkPool()

        async def ask(lease: Lease) -> None:
            async with lease.session({}, 3) as session:
                await session.ask({"text": "hello?"}, 60.0)

        async with pool.lease(replica.handle, PATIENCE_S) as lease:
            tasks = [asyncio.create_task(ask(lease)) for _ in range(3)]
            await until(lambda: replica.open == 3)
        for task in tasks:
            with pytest.raises(PeerGone):
                await asyncio.wait_for(task, PATIENCE_S)
        await replica.until_free()


async def test_a_session_without_a_lease_is_refused() -> None:
    async with running(echo) as replica:
        stranger: Any = GrantedHandle({"endpoint": replica.server._endpoint, "secret": "guessed"})
        with pytest.raises(PeerGone):
            async with LinkPool().session(stranger, {}, PATIENCE_S):
                pytest.fail("must not open")
        assert replica.open == 0


class Frames:
    """The sizes of the frames that both ends sent while the block ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []

        def noting(entries: Sequence[Entry]) -> bytes:
            self.sizes.append(len(entries))
            return messages.encode(entries)

        monkeypatch.setattr(link, "encode", noting)


async def test_what_many_sessions_have_to_say_goes_in_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(echo) as replica, AsyncExitStack() as stack:
        pool = LinkPool()
        opening = (pool.session(replica.handle, {}, PATIENCE_S) for _ in range(16))
        sessions = [await stack.enter_async_context(session) for session in opening]
        frames = Frames(monkeypatch)
        answers = await asyncio.gather(*(s.ask({"text": i}, PATIENCE_S) for i, s in enumerate(sessions)))
        assert [answer["echo"] for answer in answers] == list(range(16))
        assert frames.sizes == [16, 16]
        assert len(pool._links) == 1


async def test_sessions_of_a_link_do_not_wait_for_one_another() -> None:
    waiting = asyncio.Event()

    async def answer(message: Message) -> Message:
        if message.get("wait"):
            await waiting.wait()
        return {}

    async with running(answer) as replica:
        pool = LinkPool()
        open_two = pool.session(replica.handle, {}, PATIENCE_S), pool.session(replica.handle, {}, PATIENCE_S)
        async with open_two[0] as slow, open_two[1] as quick:
            held_up = asyncio.create_task(slow.ask({"wait": True}, PATIENCE_S))
            for _ in range(3):
                await quick.ask({}, PATIENCE_S)
            assert not held_up.done()
            waiting.set()
            await held_up


async def test_the_end_of_a_link_ends_all_its_sessions_and_a_new_one_is_made() -> None:
    async with running(silence) as replica:
        pool = LinkPool()
        tasks = [asyncio.create_task(ask_in_vain(replica, pool)) for _ in range(3)]
        await until(lambda: replica.open == 3)
        (broken,) = pool._links.values()
        broken.end.close()
        for task in tasks:
            with pytest.raises(PeerGone):
                await asyncio.wait_for(task, PATIENCE_S)
        await replica.until_free()
        await until(lambda: not pool._links)
        async with pool.session(replica.handle, {}, PATIENCE_S):
            assert replica.open == 1
        await pool.close()


async def test_closing_the_pool_frees_what_is_open() -> None:
    async with running(silence) as replica:
        pool = LinkPool()
        task = asyncio.create_task(ask_in_vain(replica, pool))
        await until(lambda: replica.open == 1)
        await pool.close()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(task, PATIENCE_S)
        await replica.until_free()
        assert not pool._links


async def test_a_question_given_up_is_the_sessions_last() -> None:
    """Its answer must not be taken for the next one's."""
    async with running(silence) as replica, LinkPool().session(replica.handle, {}, PATIENCE_S) as session:
        for _ in range(2):
            with pytest.raises(PeerGone):
                await session.ask({}, 0.05)


async def test_a_peer_of_another_version_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(entries: Sequence[Entry]) -> bytes:
        monkeypatch.setattr(link, "encode", messages.encode)
        return cast(bytes, msgpack.packb([messages.VERSION - 1, list(entries)]))

    async with running(echo) as replica:
        monkeypatch.setattr(link, "encode", older)
        with pytest.raises(PeerGone, match="redeploy the older application"):
            async with LinkPool().session(replica.handle, {}, PATIENCE_S):
                pytest.fail("must not open")
        await until(lambda: replica.open == 0)


async def test_of_a_replica_that_can_do_no_more_only_sessions_that_wait_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leasing, "_SIGN_OF_LIFE_S", 0.02)
    async with running(echo) as replica, LinkPool().session(replica.handle, {}, PATIENCE_S) as session:

        def check() -> None:
            raise RuntimeError("lost")

        monkeypatch.setattr(replica.server, "check", check)
        await asyncio.sleep(0.1)  # several signs of life
        assert (await session.ask({"text": "at once"}, PATIENCE_S))["echo"] == "at once"
