"""One streamed answer in the OpenAI format: what arrived when, and what it came to.

Knows events and clocks; nothing of sockets. Times are seconds of `time.perf_counter`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of one request. One that failed has an `error`, and what had arrived until then."""

    question: str
    sent: float
    arrivals: tuple[float, ...]  # of the chunks that carry text
    ended: float
    tokens: int
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, which the server says it had
    tokens_are_chunks: bool = False  # the server did not say how many tokens it were
    metrics: Json = field(default_factory=dict)  # the server's own, as they were sent
    refusals: int = 0  # times it was told to come again
    status: int = 200  # of HTTP
    error: str | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.sent

    @property
    def first_token_s(self) -> float | None:
        """Time to the first chunk with text; none where nothing came."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def gaps_s(self) -> list[float]:
        """Between the chunks with text: what `vllm bench serve` calls inter-token latency."""
        return [late - early for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first, as `vllm bench serve` has it; none for one token."""
        if self.tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)


@dataclass
class Reading:
    """A stream of server-sent events while it is read."""

    arrivals: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    usage: Json = field(default_factory=dict)
    metrics: Json = field(default_factory=dict)
    is_whole: bool = False
    error: str | None = None
    _rest: bytes = b""

    def feed(self, data: bytes, now: float) -> None:
        """Take what came off the socket at once, at `now`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.is_whole = True
            return
        try:
            event = json.loads(data)
            self._count(event, now)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            self.error = self.error or f"an event that is not in the OpenAI format: {error!r}"

    def _count(self, event: Json, now: float) -> None:
        if event.get("error"):
            self.error = self.error or _message(event)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
                self.arrivals.append(now)
                self.texts.append(text)
            self.is_whole = self.is_whole or choice.get("finish_reason") is not None
        self.usage = event.get("usage") or self.usage
        self.metrics = event.get("metrics") or self.metrics

    def answer(self, question: str, sent: float, ended: float, refusals: int) -> Answer:
        """What it came to, once nothing more comes."""
        said = self.usage.get("completion_tokens")
        details = self.usage.get("prompt_tokens_details") or {}
        cut = None if self.is_whole else "the stream ended before the answer did"
        return Answer(
            question, sent, tuple(self.arrivals), ended,
            tokens=len(self.arrivals) if said is None else said,
            text="".join(self.texts),
            prompt_tokens=self.usage.get("prompt_tokens") or 0,
            cached_tokens=details.get("cached_tokens") or 0,
            tokens_are_chunks=said is None,
            metrics=self.metrics, refusals=refusals, error=self.error or cut,
        )  # fmt: skip


def _message(event: Json) -> str:
    error = event["error"]
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def refusal_text(body: bytes) -> str:
    """What the body of an error says, on one line, its beginning."""
    try:
        event = json.loads(body)
        text = _message(event) if isinstance(event, dict) and "error" in event else body.decode()
    except ValueError:
        text = body.decode(errors="replace")
    return " ".join(text.split())[:200]
