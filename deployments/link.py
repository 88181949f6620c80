"""A link: one gRPC stream between two processes that carries all their sessions, both ways, while both live.

Its frames are lists of entries, each for one session; whatever is ready when a frame is written goes in it. So
what a step of many sessions costs here depends on the frames, which are few, not on the sessions.

Knows gRPC, frames and entries; nothing of leases or of what entries mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from deployments.messages import Entry, Kind, Message, encode

METHOD = ("taps.Link", "Open")
_CLOSE_DEADLINE_S = 5.0
# All of these are needed for a frozen peer to be noticed within seconds.
OPTIONS = [
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.max_receive_message_length", 256 << 20),
]


class Outbox:
    """Entries on their way to the far side. Sessions bound them: each has one question under way at most."""

    def __init__(self, write: Callable[[bytes], Awaitable[object]]) -> None:
        """Args: write: sends one frame, and returns once the next one may be sent."""
        self._write = write
        self._entries: list[Entry] = []
        self._news = asyncio.Event()

    def put(self, session: int, kind: Kind, body: Message | None = None) -> None:
        self._entries.append((session, kind, body))
        self._news.set()

    async def run(self) -> None:
        """Send what is put here, until cancelled; raises what `write` raises."""
        while True:
            await self._news.wait()
            await asyncio.sleep(0)  # what other sessions have at hand goes along
            self._news.clear()
            entries, self._entries = self._entries, []
            await self._send(encode(entries))

    async def _send(self, frame: bytes) -> None:
        writing = asyncio.ensure_future(self._write(frame))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # gRPC takes a status only after the write before it has ended.
            await asyncio.wait({writing}, timeout=_CLOSE_DEADLINE_S)
            raise
