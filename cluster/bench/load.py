"""Load on one server: requests, and closed loops of them. Knows HTTP; nothing of what is compared.

A closed loop is a fixed number of streams, each of which sends its next request when its last was answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import httpx

from cluster.bench.streams import Answer, Json, Reading, refusal_text

_REFUSED = (429, 503)  # come again later
_PAUSE_S = 0.25  # before a refused request is sent again, where the server does not say
_PATIENCE_S = 90.0  # how long a request may go on being refused
_IDLE_S = 2.0  # less than servers keep idle connections, so that none is closed as we write
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Ask(NamedTuple):
    """One request."""

    question: str  # its id
    messages: Sequence[Mapping[str, str]]
    max_tokens: int
    temperature: float
    seed: int
    salt: str


class Loop(NamedTuple):
    """What one closed loop came to."""

    answers: tuple[Answer, ...]  # as they ended
    seconds: float  # from the first request to the end of the last answer
    client_cpu_s: float  # of this process


def minds_proxies(url: str) -> bool:
    """Whether the environment's proxies are for this URL: never for this machine."""
    return httpx.URL(url).host not in _LOOPBACK


class Client:
    """One server, asked in one way."""

    def __init__(
        self,
        url: str,
        model: str,
        body: Json,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Args: url: without /v1; body: more fields of every request; `None` leaves one out; timeout_s: silence
        on a stream that counts as its failure."""
        self._model = model
        self._body = body
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        plain = {"Accept-Encoding": "identity"}  # what compresses a stream holds text back
        self._http = httpx.AsyncClient(
            base_url=url, headers={**plain, **(headers or {})}, limits=limits,
            timeout=httpx.Timeout(timeout_s, connect=10.0), trust_env=minds_proxies(url),
        )  # fmt: skip

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, ask: Ask) -> Answer:
        """Every failure is an answer with an `error`. Its time begins with the first try, if it was refused."""
        body = self._request(ask)
        sent, refusals = time.perf_counter(), 0
        while True:
            try:
                answer, again_in_s = await self._try(ask.question, body, sent, refusals)
            except httpx.HTTPError as error:
                return _failed(ask.question, sent, refusals, f"{type(error).__name__} {error}".strip())
            if again_in_s is None or time.perf_counter() - sent + again_in_s > _PATIENCE_S:
                return answer
            refusals += 1
            await asyncio.sleep(again_in_s)

    def _request(self, ask: Ask) -> Json:
        fields = {
            "model": self._model, "messages": ask.messages, "max_tokens": ask.max_tokens,
            "temperature": ask.temperature, "seed": ask.seed, "cache_salt": ask.salt,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return {name: value for name, value in (fields | self._body).items() if value is not None}

    async def _try(self, question: str, body: Json, sent: float, refusals: int) -> tuple[Answer, float | None]:
        """What came of it, and in how many seconds to try again if it was refused."""
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = refusal_text(await response.aread())
                error = f"HTTP {response.status_code}: {text}"
                again = _pause(response) if response.status_code in _REFUSED else None
                return _failed(question, sent, refusals, error, response.status_code), again
            reading = Reading()
            try:
                async for data in response.aiter_bytes():
                    reading.feed(data, time.perf_counter())
            except httpx.HTTPError as error:  # whatever had come is part of the answer
                reading.error = reading.error or f"{type(error).__name__} {error}".strip()
            return reading.answer(question, sent, time.perf_counter(), refusals), None


def _pause(response: httpx.Response) -> float:
    said = response.headers.get("retry-after", "")
    return min(float(said), _PATIENCE_S) if said.isdecimal() else _PAUSE_S


def _failed(question: str, sent: float, refusals: int, error: str, status: int = 200) -> Answer:
    ended = time.perf_counter()
    return Answer(question, sent, (), ended, 0, refusals=refusals, status=status, error=error)


async def closed_loop(client: Client, asks: Sequence[Ask], num_streams: int) -> Loop:
    """Ask all of `asks`, never more than `num_streams` at once."""
    answers: list[Answer] = []
    waiting = iter(asks)
    cpu, started = time.process_time(), time.perf_counter()
    await asyncio.gather(*(_stream(client, waiting, answers) for _ in range(min(num_streams, len(asks)))))
    return Loop(tuple(answers), time.perf_counter() - started, time.process_time() - cpu)


async def _stream(client: Client, waiting: Iterator[Ask], answers: list[Answer]) -> None:
    for ask in waiting:
        answers.append(await client.ask(ask))
