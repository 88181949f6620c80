"""Spans of a request: one for it, and below it those of waiting, prefills and steps; or none at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from deployments.record import RequestRecord
from deployments.tracing import RequestTrace
from taps.peers import PeerBusy
from tests.test_record import JOB, PREFILL, VERIFY


class Traced:
    """A tracer, and the spans that have ended."""

    def __init__(self) -> None:
        self._spans, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.tracer: Tracer = provider.get_tracer("tests")

    @property
    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self._spans.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def traced() -> Traced:
    return Traced()


def _inside(inner: Sequence[ReadableSpan], outer: ReadableSpan) -> bool:
    assert outer.context is not None
    return all(span.parent is not None and span.parent.span_id == outer.context.span_id for span in inner)


def test_a_request_has_a_span_for_everything_it_waits_for(traced: Traced) -> None:
    record = RequestRecord("request-1", [JOB])
    trace = RequestTrace(record, traced.tracer)
    with trace.leasing():
        pass
    for step, delivered in ((PREFILL, 1), (VERIFY, 3), (VERIFY, 2)):
        record.take(step, delivered)
        trace.step(step, record)
    trace.end(record, "stop")
    spans = traced.spans
    assert {name: len(found) for name, found in spans.items()} == {
        "taps.request": 1, "taps.lease": 1, "taps.prefill": 1, "taps.step": 2
    }  # fmt: skip
    (request,) = spans.pop("taps.request")
    assert all(_inside(found, request) for found in spans.values())
    assert dict(request.attributes or {}) == {
        "taps.request_id": "request-1", "taps.strategy": "merged", "taps.drafters": ("math", "chat"),
        "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 6, "taps.outcome": "stop",
        "taps.acceptance_length": 2.5,
    }  # fmt: skip
    about = spans["taps.step"][0].attributes or {}
    assert (about["taps.tokens"], about["taps.nodes"], about["taps.accepted"]) == (3, 3, 2)


def test_a_steps_span_lasts_since_the_one_before(traced: Traced) -> None:
    record = RequestRecord("request-1", [JOB])
    trace = RequestTrace(record, traced.tracer)
    record.take(VERIFY, 3)
    record.step_ms = 40.0
    trace.step(VERIFY, record)
    (span,) = traced.spans["taps.step"]
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 40_000_000


def test_a_lease_that_is_not_had_is_an_error_of_its_span(traced: Traced) -> None:
    trace = RequestTrace(RequestRecord("request-1", [JOB]), traced.tracer)
    with pytest.raises(PeerBusy), trace.leasing():
        raise PeerBusy("no replica was free")
    (span,) = traced.spans["taps.lease"]
    assert not span.status.is_ok


def test_without_a_tracer_nothing_is_recorded() -> None:
    record = RequestRecord("request-1", [JOB])
    trace = RequestTrace(record)
    with trace.leasing():
        record.take(PREFILL, 1)
    trace.step(PREFILL, record)
    trace.end(record, "stop")
