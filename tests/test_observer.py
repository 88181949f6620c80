"""What operators see: every step and every request is counted once, under the names that are documented."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest

from deployments.metrics import Capacity, Observer
from deployments.record import RequestRecord
from taps.decoding.policy import Step
from tests.fakes import make_verdict
from tests.test_record import JOB, PREFILL, VERIFY

Observed = dict[str, list[tuple[float, dict[str, str]]]]


class Metric:
    """A counter or a histogram, as strict as Ray's are."""

    def __init__(self, into: Observed, name: str, tag_keys: Sequence[str] = ()) -> None:
        self._into = into
        self._name = name
        self._tag_keys = tag_keys

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        assert value > 0, "a counter goes up"
        assert set(tags or {}) == set(self._tag_keys)
        self.observe(value, tags)

    def set(self, value: float) -> None:
        self.observe(value)

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self._into[self._name].append((value, dict(tags or {})))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Observed:
    """What the metrics of an observer that is made now come to."""
    into: Observed = defaultdict(list)

    def counter(name: str, _: str, tag_keys: Sequence[str] = ()) -> Metric:
        return Metric(into, name, tag_keys)

    def histogram(name: str, _: str, boundaries: Sequence[float]) -> Metric:
        assert list(boundaries) == sorted(set(boundaries))
        return Metric(into, name)

    kinds = SimpleNamespace(Counter=counter, Histogram=histogram, Gauge=counter)
    monkeypatch.setattr("deployments.metrics.metrics", kinds)
    return into


def run(steps: Sequence[tuple[Step, int]], outcome: str = "stop") -> RequestRecord:
    """One request with these steps, each delivering so many tokens, seen from its start to its end."""
    observer, record = Observer(), RequestRecord("request-1", [JOB])
    observer.observe_begin(record)
    for step, delivered in steps:
        record.take(step, delivered)
        observer.observe_step(step, record)
    observer.observe_end(record, outcome)
    told = observer.recent.told()
    assert (told["answering"], told["requests"], told["tokens"]) == (0, {outcome: 1}, record.new_tokens)
    return record


def totals(observed: Observed) -> dict[str, float]:
    return {name: sum(value for value, _ in values) for name, values in observed.items()}


def test_tokens_and_passes_are_counted(observed: Observed) -> None:
    run([(PREFILL, 1), (VERIFY, 3), (VERIFY, 2)])
    counted = totals(observed)
    assert (counted["taps_tokens"], counted["taps_prompt_tokens"]) == (6, 5)
    assert (counted["taps_verify_passes"], counted["taps_verify_sessions"]) == (2, 2)
    assert [value for value, _ in observed["taps_draft_ms"]] == [2.0, 2.0]
    assert [value for value, _ in observed["taps_verify_ms"]] == [10.0, 10.0]


def test_steps_are_told_now_and_then_while_an_answer_lasts(observed: Observed) -> None:
    now = 0.0
    observer, record = Observer(lambda: now), RequestRecord("request-1", [JOB])
    observer.observe_begin(record)
    record.take(VERIFY, 3)
    observer.observe_step(VERIFY, record)
    assert not observed
    now = 1.0
    observer.observe_step(VERIFY, record)
    assert totals(observed)["taps_tokens"] == 6
    observer.observe_step(VERIFY, record)
    assert totals(observed)["taps_tokens"] == 6, "told a moment ago"
    observer.observe_end(record, "stop")
    assert totals(observed)["taps_tokens"] == 9


def test_drafted_and_accepted_tokens_are_counted_by_drafter(observed: Observed) -> None:
    run([(PREFILL, 1), (VERIFY, 3)])
    assert observed["taps_draft_tokens"] == [(2, {"drafter": "math"}), (2, {"drafter": "chat"})]
    assert observed["taps_accepted_tokens"] == [(2, {"drafter": "math"}), (1, {"drafter": "chat"})]
    assert observed["taps_drafter_passes"] == [(1, {"drafter": "math"}), (1, {"drafter": "chat"})]
    assert not observed["taps_plain_passes"]


def test_passes_without_drafts_are_told_apart(observed: Observed) -> None:
    plain = Step(make_verdict([5]), False, 0.0, 1.0)
    run([(PREFILL, 1), (VERIFY, 3), (plain, 1), (plain, 1)])
    assert observed["taps_plain_passes"] == [(2, {})]
    assert totals(observed)["taps_verify_sessions"] == 3


def test_what_was_found_in_a_cache_is_counted(observed: Observed) -> None:
    found = replace(PREFILL, verdict=replace(PREFILL.verdict, num_reused=4))
    run([(found, 1), (VERIFY, 3)])
    assert observed["taps_cached_tokens"] == [(4, {})]


def test_a_verifier_tells_what_is_left_of_its_cache(observed: Observed) -> None:
    capacity = Capacity()
    capacity.open()
    capacity.observe(pages=100, free=40, leases=3)
    assert totals(observed) == {
        "taps_sessions": 1, "taps_cache_pages": 100, "taps_cache_pages_free": 40, "taps_leases": 3
    }  # fmt: skip


def test_a_pass_that_sessions_share_is_counted_once_over_all_of_them(observed: Observed) -> None:
    shared = replace(VERIFY, verdict=replace(VERIFY.verdict, batch_size=4))
    for _ in range(4):
        run([(PREFILL, 1), (shared, 3)])
    assert totals(observed)["taps_verify_passes"] == pytest.approx(1.0)
    assert totals(observed)["taps_verify_sessions"] == 4
    assert {value for value, _ in observed["taps_verify_batch_size"]} == {4}


def test_a_failover_prefills_again_but_the_first_token_comes_once(observed: Observed) -> None:
    run([(PREFILL, 1), (VERIFY, 3), (PREFILL, 1), (VERIFY, 3)])
    assert len(observed["taps_time_to_first_token_ms"]) == 1
    assert totals(observed)["taps_prompt_tokens"] == 5


def test_time_between_tokens_is_the_mean_of_a_step(observed: Observed) -> None:
    record = run([(PREFILL, 1), (VERIFY, 3)])
    assert observed["taps_inter_token_ms"] == [(record.step_ms / 3, {})]


@pytest.mark.parametrize("outcome", ["stop", "length", "cancelled", "overloaded", "refused", "failed"])
def test_a_request_ends_once_and_leaves_a_line(
    observed: Observed, caplog: pytest.LogCaptureFixture, outcome: str
) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        run([(PREFILL, 1)], outcome)
    assert observed["taps_requests"] == [(1.0, {"outcome": outcome})]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"request-1 {outcome}"]


def test_a_refused_request_is_counted_and_its_reason_is_logged(
    observed: Observed, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        Observer().observe_refusal("too long")
    assert observed["taps_requests"] == [(1.0, {"outcome": "refused"})]
    assert [record.getMessage() for record in caplog.records] == ["request refused: too long"]


def test_rays_own_metrics_take_what_is_observed() -> None:
    run([(PREFILL, 1), (VERIFY, 3), (Step(make_verdict([5]), False, 0.0, 1.0), 1)])
    Observer().observe_refusal("too long")
