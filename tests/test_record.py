"""The record of one request: what its steps came to, as the log and the response tell it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from deployments.record import RequestRecord
from deployments.requests import Generation
from taps.decoding.policy import Step
from taps.drafting.drafter import Ask
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from tests.fakes import make_verdict

JOB = Generation(SessionState((7,) * 5, 0, SamplingParams(), 100), (), "merged", ("math", "chat"), Ask())
PREFILL = Step(make_verdict([1]), True, 0.0, 30.0)
# Three drafted nodes were checked, two of them accepted: math has both, chat one.
VERIFY = Step(make_verdict([2, 3, 4], owners=[0b01, 0b11], num_nodes=3, depth=2), False, 2.0, 10.0, (1, 3, 2))


@pytest.fixture
def record() -> RequestRecord:
    return RequestRecord("request-1", [JOB])


def test_a_new_record_knows_what_was_asked_for(record: RequestRecord) -> None:
    assert (record.id, record.prompt_tokens, record.strategy, record.drafters) == (
        "request-1", 5, "merged", ("math", "chat"),
    )  # fmt: skip
    assert (record.new_tokens, record.num_prefills, record.counts.num_passes) == (0, 0, 0)


def test_steps_add_up(record: RequestRecord) -> None:
    for step, delivered in [(PREFILL, 1), (VERIFY, 3), (VERIFY, 3)]:
        record.take(step, delivered)
    assert (record.new_tokens, record.step_tokens) == (7, 3)
    assert (record.draft_ms, record.verify_ms) == (4.0, 20.0)
    assert record.drafted_by_drafter == {0: 4, 1: 4}
    assert record.counts.accepted_by_drafter == {0: 4, 1: 2}


def test_a_prefill_is_no_pass(record: RequestRecord) -> None:
    record.take(PREFILL, 1)
    assert record.num_prefills == 1
    assert (record.counts.num_passes, record.batch_sizes, record.verify_ms) == (0, 0, 0.0)


def test_tokens_that_were_cut_do_not_count(record: RequestRecord) -> None:
    record.take(PREFILL, 1)
    record.take(VERIFY, 1)
    assert record.new_tokens == 2
    assert record.counts.num_accepted == 1
    assert record.counts.accepted_by_drafter == {0: 1}


def timed(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> RequestRecord:
    """A record that looks at the clock at these times, first when it begins."""
    monkeypatch.setattr("deployments.record.time.perf_counter", partial(next, iter(seconds)))
    return RequestRecord("request-1", [JOB])


def test_a_step_lasts_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    record = timed(monkeypatch, 10.0, 10.25, 10.75)
    lasted = []
    for step, delivered in [(PREFILL, 1), (VERIFY, 3)]:
        record.take(step, delivered)
        lasted.append(record.step_ms)
    assert lasted == [250.0, 500.0]


def test_the_line_tells_outcome_speed_and_who_helped(record: RequestRecord) -> None:
    record.take(PREFILL, 1)
    record.take(VERIFY, 3)
    line = record.line("stop")
    assert line.startswith("request-1 stop: 5 prompt (0 cached) + 4 new tokens in ")
    assert "merged: 1 passes, 3.00 tokens/pass, batch 1.0, draft 2.0 ms, verify 10.0 ms" in line
    assert line.endswith("accepted: math 2, chat 1")


def test_the_time_to_the_first_token_is_the_first_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that is lost is prefilled again, when tokens have been delivered already."""
    record = timed(monkeypatch, 10.0, 10.25, 11.0, 12.0)
    record.take(PREFILL, 1)
    record.take(PREFILL, 1)
    assert record.num_prefills == 2
    assert "2 new tokens in 2.00 s (1.0/s), first after 250 ms" in record.line("stop")


def test_a_request_that_came_to_nothing_has_a_line_too(record: RequestRecord) -> None:
    plain = RequestRecord("request-2", [replace(JOB, strategy="off", drafters=())])
    assert "0 new tokens" in record.line("cancelled")
    assert "off: 0 passes, 0.00 tokens/pass" in plain.line("failed")
    assert "accepted" not in plain.line("failed")


def test_what_was_cached_is_what_the_first_verifier_had(record: RequestRecord) -> None:
    for reused in (3, 5):
        verdict = replace(make_verdict([1]), num_reused=reused)
        record.take(Step(verdict, True, 0.0, 1.0), 1)
    assert record.cached_tokens == 3
    assert "5 prompt (3 cached) + 2 new tokens" in record.line("stop")


def test_answers_of_one_request_are_counted_together() -> None:
    """Prompts once each, what was cached of each as its first answer found it."""
    other = replace(JOB, state=replace(JOB.state, tokens=(7,) * 3))
    again = replace(JOB, state=replace(JOB.state, sampling=SamplingParams(choice=1)))
    record = RequestRecord("request-1", [JOB, again, other])
    assert record.prompt_tokens == 8
    for index, reused in enumerate((2, 4, 1)):
        record.take(Step(replace(make_verdict([1]), num_reused=reused), True, 0.0, 1.0), 1, index)
    assert (record.cached_tokens, record.num_prefills, record.new_tokens) == (3, 3, 3)
    record.take(VERIFY, 3, 1)
    assert record.new_tokens == 6


def test_a_step_that_is_explained_has_its_tree() -> None:
    record = RequestRecord("request-1", [replace(JOB, explains=True)], lambda token: f"<{token}>")
    nodes = [(2, 0, -0.1, 0b01), (9, 0, -0.2, 0b10), (3, 1, -0.3, 0b11)]
    tree = ProposalTree.ordered(1, nodes, 4)
    record.take(PREFILL, 1)
    record.take(replace(VERIFY, verdict=replace(VERIFY.verdict, checked=tree)), 3)
    assert record.steps is not None
    (step,) = record.steps
    assert step["text"] == ["<2>", "<3>", "<4>"]
    assert step["tree"] == [
        {"text": "<2>", "parent": -1, "drafters": ["math"], "accepted": True},
        {"text": "<9>", "parent": -1, "drafters": ["chat"], "accepted": False},
        {"text": "<3>", "parent": 0, "drafters": ["math", "chat"], "accepted": True},
    ]
