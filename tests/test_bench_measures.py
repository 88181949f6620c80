"""Figures of one round, on answers made by hand."""

from __future__ import annotations

import pytest

from cluster.bench.experiment import Cell, Served
from cluster.bench.load import Loop
from cluster.bench.measures import failures, flat, measured, server_figures, unit_values
from tests.answered import answer, failed, loop

AT_FOUR, AT_ONE = Cell("math", 0.0, 4), Cell("math", 0.0, 1)


def one_round(*loops: Loop, cell: Cell = AT_FOUR, number: int = 0) -> Served:
    return Served("off", cell, number, loops)


def test_tokens_a_second_are_of_all_streams_and_of_the_whole_time() -> None:
    found = measured(one_round(loop(answer(tokens=10), answer(tokens=30), seconds=4.0)))
    assert found["tokens_per_second"] == 10.0
    assert found["tokens_per_second_per_user"] == 10.0  # the median of 5 and 15
    assert found["in_flight"] == 1.0


def test_with_one_stream_the_loops_of_a_round_are_pooled() -> None:
    found = measured(one_round(loop(answer(tokens=10, seconds=1.0)), loop(answer(tokens=10, seconds=4.0))))
    assert found["tokens_per_second"] == 4.0


def test_latencies_are_percentiles_over_the_answers_in_milliseconds() -> None:
    answers = [answer(arrivals=(0.1 * i, 0.1 * i + 0.05), seconds=9.0) for i in range(1, 12)]
    found = measured(one_round(loop(*answers)))
    assert found["ttft_ms_median"] == pytest.approx(600)
    assert found["ttft_ms_p95"] == pytest.approx(1050)
    assert found["inter_token_ms_median"] == found["inter_token_ms_p99"] == pytest.approx(50)
    assert found["ms_per_token_median"] == pytest.approx(50 / 9)


def test_a_failed_answer_counts_with_its_time_and_without_its_tokens_and_has_no_latency() -> None:
    cut = answer(tokens=500, arrivals=(0.001, 0.002), error="cut")
    found = measured(one_round(loop(answer(tokens=10), cut, seconds=5.0)))
    assert found["tokens_per_second"] == 2.0
    assert found["ttft_ms_median"] == pytest.approx(200)


def test_where_everything_failed_there_is_nothing_to_measure_but_what_went_wrong() -> None:
    lost = one_round(loop(failed(error="gone"), failed(error="gone"), failed(error="cut")))
    assert measured(lost) == {}
    assert failures([lost]) == {"gone": 2, "cut": 1}


def test_acceptance_is_pooled_over_passes_and_absent_where_a_server_counts_none() -> None:
    counts = [
        {"num_spec_steps": 10, "mean_acceptance_length": 3.0, "num_draft_tokens": 80},
        {"num_spec_steps": 30, "mean_acceptance_length": 1.0, "num_draft_tokens": 0},
    ]
    found = measured(one_round(loop(*(answer(metrics={"speculative_decoding": c}) for c in counts))))
    assert (found["acceptance_length"], found["nodes_per_pass"]) == (1.5, 2.0)
    assert "acceptance_length" not in measured(one_round(loop(answer())))
    assert "acceptance_length" not in measured(one_round(loop(answer(metrics={"speculative_decoding": None}))))


def test_the_speed_of_one_stream_is_compared_by_question_and_all_else_by_round() -> None:
    rounds = [
        one_round(loop(answer("a", seconds=1.0)), loop(answer("b", seconds=2.0)), cell=AT_ONE, number=number)
        for number in range(2)
    ]
    assert unit_values(rounds, "tokens_per_second") == {(0, "a"): 10, (0, "b"): 5, (1, "a"): 10, (1, "b"): 5}
    assert set(unit_values(rounds, "ttft_ms_median")) == {(0, ""), (1, "")}
    at_four = [one_round(loop(answer("a"), answer("b")))]
    assert set(unit_values(at_four, "tokens_per_second")) == {(0, "")}


def test_what_failed_is_not_compared() -> None:
    rounds = [one_round(loop(answer("a"), failed("b"))), one_round(loop(answer("a"), answer("b")), number=1)]
    assert set(unit_values(rounds, "tokens_per_second")) == {(1, "")}
    single = [one_round(loop(answer("a")), loop(failed("b")), cell=AT_ONE)]
    assert set(unit_values(single, "tokens_per_second")) == {(0, "a")}


def test_other_numbers_a_server_gives_are_kept_whatever_they_are_called() -> None:
    metrics = {
        "speculative_decoding": {"x": 1},
        "step": {"draft_ms": 3, "deep": {"n": 1.5}},
        "text": "a",
        "is": True,
    }
    assert flat(metrics["step"] if isinstance(metrics["step"], dict) else {}) == {"draft_ms": 3, "deep.n": 1.5}
    others = [answer(metrics=metrics), answer(metrics=metrics | {"step": {"draft_ms": 5}}), answer()]
    assert server_figures([one_round(loop(*others))]) == {"step.draft_ms": 4, "step.deep.n": 1.5}
