"""A link: one TCP connection between two processes that carries all their sessions, both ways, while both live.

Its frames are lists of entries, each for one session; whatever is ready when a frame is written goes in it. So
what a step of many sessions costs here depends on the frames, which are few, not on the sessions. A frame is
its length in four bytes and that many of msgpack. They go straight to the connection and come straight from
it: through gRPC each way took a third of a millisecond more, and twice the processor (docs/step-time.md).

Knows connections, frames and entries; nothing of leases or of what entries mean.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

from deployments.messages import (
    BrokenFrame,
    Entry,
    Kind,
    Message,
    VersionMismatch,
    decode,
    encode,
    error_message,
)
from taps.peers import PeerGone

_LENGTH = struct.Struct("<I")
_MOST_BYTES = 256 << 20  # of a frame; the largest have the features of long prompts
# Both ends say something at least so often, and one that is silent for so many of these times is gone.
_TICK_S, _SILENT_TICKS = 1.0, 4


class Link(asyncio.Protocol):
    """One end. What is put before it is connected goes out then."""

    def __init__(self, take: Callable[[Entry], None]) -> None:
        """Args: take: called with every entry that comes, in order."""
        self._take = take
        self._transport: asyncio.Transport | None = None
        self._entries: list[Entry] = []  # sessions bound them: each has one question under way at most
        self._is_due = False  # they are going out in this turn of the event loop
        self._received = bytearray()  # of a frame that is not complete
        self._was_heard = self._was_told = True  # since the last tick
        self._silent_ticks = 0
        # Why it ended.
        self.lost: asyncio.Future[PeerGone] = asyncio.get_running_loop().create_future()

    @property
    def is_up(self) -> bool:
        return not self.lost.done()

    def put(self, session: int, kind: Kind, body: Message | None = None) -> None:
        """Session 0 is all of the link. What is put in one turn of the event loop goes in one frame."""
        if not self.is_up:
            return
        self._entries.append((session, kind, body))
        if self._transport is not None and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._send)

    def close(self, why: PeerGone | None = None) -> None:
        """End it, once what was put has gone out. Args: why: what its sessions are told."""
        if self.is_up:
            if self._entries and self._transport is not None:
                self._send()
            self.lost.set_result(why or PeerGone("the link was closed"))
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self.is_up:
            transport.close()
            return
        asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        if self._entries:
            self._send()

    def data_received(self, data: bytes) -> None:
        self._was_heard = True
        self._received += data
        try:
            while self.is_up and (frame := self._next_frame()) is not None:
                for entry in decode(frame):
                    self._take_in(entry)
        except (VersionMismatch, BrokenFrame) as error:
            self.put(0, "error", error_message(error))
            self.close(error)

    def connection_lost(self, error: Exception | None) -> None:
        reason = "the peer ended the link" if error is None else f"the peer is gone: {error}"
        self.close(PeerGone(reason))

    def _take_in(self, entry: Entry) -> None:
        session, kind, body = entry
        if session == 0 and kind == "error":  # the far side can make nothing of this one
            self.close(PeerGone((body or {})["text"]))
        else:
            self._take(entry)

    def _next_frame(self) -> bytes | None:
        """Raises `BrokenFrame`."""
        start = _LENGTH.size
        if len(self._received) < start:
            return None
        (size,) = _LENGTH.unpack_from(self._received)
        if size > _MOST_BYTES:
            raise BrokenFrame(f"a frame of {size} bytes: what connects here must be a router of this cluster")
        if len(self._received) < start + size:
            return None
        frame = bytes(self._received[start : start + size])
        del self._received[: start + size]
        return frame

    def _send(self) -> None:
        self._is_due = False
        entries, self._entries = self._entries, []
        if self._transport is not None and self.is_up:
            frame = encode(entries)
            self._transport.write(_LENGTH.pack(len(frame)) + frame)
            self._was_told = True

    def _tick(self) -> None:
        """Ticks count, not time: a process that was set aside does not take itself for the silent one."""
        assert self._transport is not None, "ticks begin with the connection"
        self._silent_ticks = 0 if self._was_heard else self._silent_ticks + 1
        if self._silent_ticks >= _SILENT_TICKS:
            self.close(PeerGone(f"no sign of life for {_SILENT_TICKS * _TICK_S:g} s"))
        if not self.is_up:
            self._transport.abort()  # what it has not taken by now it will not
            return
        if not self._was_told:
            self._send()
        self._was_heard = self._was_told = False
        asyncio.get_running_loop().call_later(_TICK_S, self._tick)
