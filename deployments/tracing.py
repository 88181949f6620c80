"""OpenTelemetry spans of a request: waiting for a verifier, its prefills and its steps, below Serve's span.

Nothing is traced unless Serve is told where spans go (`RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH`): without that
the tracer here does nothing (docs/watching.md). Knows records and steps; nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace

from deployments.record import RequestRecord
from taps.decoding.policy import Step

_TRACER = trace.get_tracer("taps")


class RequestTrace:
    """One request's. It begins when it is made, below the span of whoever makes it; `end` it."""

    def __init__(self, record: RequestRecord, tracer: trace.Tracer = _TRACER) -> None:
        about: dict[str, Any] = {
            "taps.request_id": record.id,
            "taps.strategy": record.strategy,
            "taps.drafters": record.drafters,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
        }
        self._tracer = tracer
        self._span = tracer.start_span("taps.request", attributes=about)
        self._within = trace.set_span_in_context(self._span)
        self._is_on = self._span.is_recording()

    @contextmanager
    def leasing(self) -> Iterator[None]:
        """While it waits for a verifier."""
        with self._tracer.start_as_current_span("taps.lease", self._within):
            yield

    def step(self, step: Step, record: RequestRecord) -> None:
        """A step that ends now, the newest its record took."""
        if not self._is_on:
            return
        verdict, now = step.verdict, time.time_ns()
        about: dict[str, Any] = {"taps.tokens": record.step_tokens, "taps.verify_ms": step.verify_ms}
        if step.is_prefill:
            about |= {"taps.cached_tokens": verdict.num_reused, "taps.numerics": step.numerics}
        else:
            about |= {
                "taps.draft_ms": step.draft_ms, "taps.nodes": verdict.num_nodes,
                "taps.accepted": len(verdict.owners), "taps.passes": verdict.num_passes,
                "taps.batch_size": verdict.batch_size,
            }  # fmt: skip
        began = now - int(record.step_ms * 1e6)
        name = "taps.prefill" if step.is_prefill else "taps.step"
        self._tracer.start_span(name, self._within, attributes=about, start_time=began).end(now)

    def end(self, record: RequestRecord, outcome: str) -> None:
        """The request was answered, or not."""
        about: dict[str, Any] = {"taps.outcome": outcome, "gen_ai.usage.output_tokens": record.new_tokens}
        self._span.set_attributes({**about, "taps.acceptance_length": record.counts.acceptance_length})
        self._span.end()
