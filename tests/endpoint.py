"""An OpenAI endpoint on a socket of its own: answers by the clock, and fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class Behaviour:
    """How one request is answered."""

    chunks: int = 4  # with text
    tokens: int = 8
    wait_s: float = 0.0  # before the first chunk
    gap_s: float = 0.0  # before each chunk after it
    status: int = 200
    message: str = "no"
    headers: str = ""
    usage: bool = True
    metrics: Json = field(default_factory=dict)
    cached_tokens: int = 0
    cut: bool = False  # the connection ends in mid-answer
    error: str | None = None  # sent in the stream


class Endpoint:
    """What a test asks of it, and what it was asked."""

    def __init__(self, behave: Callable[[Json], Behaviour], owned_by: str) -> None:
        self.behave = behave
        self.owned_by = owned_by
        self.drafters = ["math", "chat"]
        self.asked: list[Json] = []
        self.headers: list[bytes] = []
        self.most_at_once = 0
        self.url = ""
        self._now = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.headers.append(head)
                if head.startswith(b"GET"):
                    self._get(head.split(b" ")[1].decode(), writer)
                else:
                    await self._post(head, reader, writer)
                await writer.drain()

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            _write(writer, 200, {"data": [{"id": "small", "owned_by": self.owned_by}]})
        else:
            _write(writer, 200, {"status": "ok", "drafters": self.drafters, "numerics": "n1"})

    async def _post(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length" in line]
        body = json.loads(await reader.readexactly(int(lengths[0])))
        self.asked.append(body)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await self._answer(self.behave(body), writer)
        finally:
            self._now -= 1

    async def _answer(self, how: Behaviour, writer: asyncio.StreamWriter) -> None:
        if how.status != 200:
            _write(writer, how.status, {"error": {"message": how.message}}, how.headers)
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for number in range(how.chunks):
            await writer.drain()
            await asyncio.sleep(how.gap_s if number else how.wait_s)
            _event(writer, {"choices": [{"delta": {"content": "ab "}, "finish_reason": None}], "usage": None})
        if how.error is not None:
            _event(writer, {"error": {"message": how.error}})
        elif how.cut:
            writer.close()
            raise ConnectionResetError
        else:
            _event(writer, {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": None})
            if how.usage:
                details = {"cached_tokens": how.cached_tokens}
                usage = {"prompt_tokens": 10, "completion_tokens": how.tokens, "prompt_tokens_details": details}
                _event(writer, {"choices": [], "usage": usage, "metrics": how.metrics})
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _event(writer: asyncio.StreamWriter, payload: Json) -> None:
    writer.write(_chunk(f"data: {json.dumps(payload)}\n\n".encode()))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _write(writer: asyncio.StreamWriter, status: int, payload: Json, headers: str = "") -> None:
    body = json.dumps(payload).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)


@contextmanager
def endpoint(behave: Callable[[Json], Behaviour], owned_by: str = "taps") -> Iterator[Endpoint]:
    """An endpoint that runs in a thread of its own."""
    served = Endpoint(behave, owned_by)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(served.serve, "127.0.0.1", 0), loop).result()
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.01)  # closed connections go when the loop comes round
