"""One end of a link: what it takes for a frame, and when it takes the far side for gone."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest

from deployments import link
from deployments.link import Link
from deployments.linking import LinkPool
from deployments.messages import VERSION, BrokenFrame, Entry, Message, encode
from taps.peers import PeerGone
from tests import replicas
from tests.fakes import until
from tests.replicas import PATIENCE_S, GrantedHandle

QUICK_S = 0.02


@pytest.fixture
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_TICK_S", QUICK_S)


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


class Ends:
    """A link's end, what it took, and the far side's bare socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.taken: list[Entry] = []
        self.link = Link(self.taken.append)

    async def read(self) -> Any:
        (size,) = struct.unpack("<I", await self.reader.readexactly(4))
        return msgpack.unpackb(await self.reader.readexactly(size), use_list=False)


@asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    mine, other = socket.socketpair()
    ends = Ends(*await asyncio.open_connection(sock=other))
    await asyncio.get_running_loop().create_connection(lambda: ends.link, sock=mine)
    try:
        yield ends
    finally:
        ends.link.close()
        ends.writer.close()


@pytest.mark.parametrize("size", [1, 3, 5, 1 << 20])
async def test_frames_are_taken_in_whatever_pieces_they_come(size: int) -> None:
    entries: list[Entry] = [(1, "ask", {"n": n, "data": bytes(n)}) for n in range(40)]
    stream = b"".join(framed(encode(entries[at : at + 7])) for at in range(0, len(entries), 7))
    async with connected() as ends:
        for at in range(0, len(stream), size):
            ends.link.data_received(stream[at : at + size])
    assert ends.taken == entries


async def test_what_is_put_in_one_turn_goes_in_one_frame() -> None:
    async with connected() as ends:
        for number in range(3):
            ends.link.put(number + 1, "ask", {})
        assert await ends.read() == (VERSION, ((1, "ask", {}), (2, "ask", {}), (3, "ask", {})))
        ends.link.put(4, "end")
        assert await ends.read() == (VERSION, ((4, "end", None),))


async def test_what_was_put_before_the_end_goes_out_and_nothing_after_it() -> None:
    async with connected() as ends:
        ends.link.put(1, "end")
        ends.link.close()
        ends.link.put(2, "end")
        assert await ends.read() == (VERSION, ((1, "end", None),))
        assert await ends.reader.read() == b""


@pytest.mark.parametrize(
    ("what", "says"),
    {
        "text": (framed(b"GET / HTTP/1.1"), "cannot be read"),
        "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "a frame of"),
        "numbers": (framed(msgpack.packb([1, 2, 3])), "cannot be read"),
    }.values(),
)
async def test_what_is_no_frame_ends_the_link_and_says_so(what: bytes, says: str) -> None:
    async with connected() as ends:
        ends.writer.write(what)
        with pytest.raises(BrokenFrame, match=says):
            raise await ends.link.lost
        _, ((session, kind, body),) = await ends.read()
        assert (session, kind, body["type"]) == (0, "error", "BrokenFrame")
        assert await ends.reader.read() == b""
    assert not ends.taken


async def test_two_ends_with_nothing_to_say_stay_up(quick_ticks: None) -> None:
    mine, other = socket.socketpair()
    one, two = Link(print), Link(print)
    await asyncio.get_running_loop().create_connection(lambda: one, sock=mine)
    await asyncio.get_running_loop().create_connection(lambda: two, sock=other)
    done, _ = await asyncio.wait({one.lost, two.lost}, timeout=20 * QUICK_S)
    assert not done
    one.close()
    async with asyncio.timeout(PATIENCE_S):
        assert "the peer ended the link" in str(await two.lost)


async def test_a_silent_far_side_is_gone(quick_ticks: None) -> None:
    async with connected() as ends:
        async with asyncio.timeout(PATIENCE_S):
            assert "no sign of life" in str(await ends.link.lost)


async def test_sessions_of_a_replica_that_froze_are_told(quick_ticks: None) -> None:
    """Its connection stays, and nothing comes."""
    writers: list[asyncio.StreamWriter] = []
    frozen = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
    host, port = frozen.sockets[0].getsockname()

    handle: Any = GrantedHandle({"endpoint": f"{host}:{port}", "secret": ""})
    with pytest.raises(PeerGone, match="no sign of life"):
        async with asyncio.timeout(PATIENCE_S), LinkPool().session(handle, {}, 60.0):
            pytest.fail("must not open")
    frozen.close()
    writers[0].close()


async def test_sessions_of_a_router_that_froze_are_freed(quick_ticks: None) -> None:
    async def echo(message: Message) -> Message:
        return message

    async with replicas.running(lambda hello: echo) as (replica,):
        lease = replica.handle.remote()
        granted = await anext(lease)
        host, _, port = granted["endpoint"].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        opening = {"secret": granted["secret"], "hello": {}, "of": 1}
        writer.write(framed(encode([(1, "open", opening)])))
        await until(lambda: replica.open == 1)
        over = asyncio.create_task(lease.finish())
        await asyncio.wait_for(over, PATIENCE_S)
        await replica.until_free()
        writer.close()


async def test_nobody_listens_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = "{}:{}".format(*unused.getsockname())
        there = LinkPool().link(endpoint)
        with pytest.raises(PeerGone, match="the peer is gone"):
            async with there.session({"secret": ""}, {}, PATIENCE_S, 1):
                pytest.fail("must not open")
