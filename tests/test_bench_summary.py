"""Which comparisons a benchmark's document makes, and that each can be read off it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.bench.experiment import Cell, Served
from cluster.bench.settings import Kind
from cluster.bench.summary import BEST, Pair, best_fixed, by_cell, pairs, ratios, rows
from tests.answered import answer, failed, loop, served

KINDS: dict[str, Kind] = {
    "off": "plain", "single": "fixed", "merged": "fixed", "adaptive": "adaptive", "vllm": "peer",
}  # fmt: skip
SPEEDS = {
    "math": {"off": 10, "single": 20, "merged": 16, "adaptive": 18, "vllm": 12},
    "chat": {"off": 10, "single": 8, "merged": 12, "adaptive": 15, "vllm": 30},
}


def measured(rounds: int = 3, streams: int = 4) -> list[Served]:
    return [
        served(name, speed * (1 + number), workload, streams=streams, number=number)  # a machine that drifts
        for number in range(rounds)
        for workload, speeds in SPEEDS.items()
        for name, speed in speeds.items()
    ]


def ratio(done: Sequence[Served], measure: str, setting: str, to: str, streams: int = 4) -> dict[str, Any]:
    wanted = (measure, setting, to, 0.0, streams)
    names = ("measure", "setting", "to", "temperature", "streams")
    (found,) = [row for row in ratios(by_cell(done), KINDS) if tuple(row[name] for name in names) == wanted]
    return found


@pytest.mark.parametrize("streams", [1, 4])
def test_adaptive_is_compared_to_plain_decoding_by_workload_and_in_the_geometric_mean(streams: int) -> None:
    found = ratio(measured(streams=streams), "tokens_per_second", "adaptive", "off", streams)
    assert found["workloads"]["math"]["median"] == 1.8
    assert found["workloads"]["chat"]["median"] == 1.5
    assert found["geometric_mean"]["value"] == pytest.approx((1.8 * 1.5) ** 0.5, rel=1e-4)
    low, high = found["geometric_mean"]["interval_95"]
    assert low == high == found["geometric_mean"]["value"]
    units = 1 if streams == 1 else 3  # one question, or three rounds
    assert found["workloads"]["math"]["units"] == units


def test_adaptive_is_compared_to_the_fixed_strategy_that_is_best_in_each_cell() -> None:
    found = ratio(measured(), "tokens_per_second", "adaptive", BEST)
    assert found["workloads"]["math"] == {"median": 0.9, "interval_95": [0.9, 0.9], "units": 3, "to": "single"}
    assert found["workloads"]["chat"]["to"] == "merged"
    assert found["workloads"]["chat"]["median"] == 1.25


def test_waiting_is_compared_to_peers_too() -> None:
    assert ratio(measured(), "ttft_ms_p95", "off", "vllm")["workloads"]["math"]["median"] == 1.2
    assert ratio(measured(), "inter_token_ms_p99", "off", "vllm")["workloads"]["chat"]["median"] == 3.0


def test_plain_decoding_is_no_fixed_strategy_even_where_it_is_the_fastest() -> None:
    runs = by_cell([served("off", 30), served("single", 20), served("merged", 10)])
    assert best_fixed(Cell("math", 0.0, 4), runs, KINDS) == "single"
    assert best_fixed(Cell("math", 0.0, 4), by_cell([served("off", 30)]), KINDS) is None


def test_every_setting_is_compared_to_plain_decoding_and_ours_to_every_peer() -> None:
    found = pairs(KINDS)
    assert [p.setting for p in found if p.to == "off"] == ["single", "merged", "adaptive", "vllm"]
    assert [p.setting for p in found if p.to == "vllm"] == ["off", "single", "merged", "adaptive"]
    assert Pair("adaptive", BEST) in found
    assert BEST not in [p.to for p in pairs({"off": "plain", "adaptive": "adaptive"})]


def test_what_was_not_measured_on_both_sides_is_left_out_of_ratios() -> None:
    done = [one for one in measured() if (one.setting, one.cell.workload) != ("adaptive", "chat")]
    assert list(ratio(done, "tokens_per_second", "adaptive", "off")["workloads"]) == ["math"]


def test_a_row_has_medians_over_rounds_with_each_of_them_and_counts_failures() -> None:
    cell = Cell("math", 1.0, 4)
    done = [
        Served("off", cell, 0, (loop(answer(tokens=20), failed(error="cut"), seconds=2.0),)),
        Served("off", cell, 1, (loop(answer(tokens=40, refusals=3, cached_tokens=5), seconds=2.0),)),
    ]
    (row,) = rows(by_cell(done))
    assert row["tokens_per_second"]["median"] == 15
    assert row["tokens_per_second"]["rounds"] == [10, 20]
    assert (row["requests"], row["failed"], row["failures"], row["refusals"]) == (3, 1, {"cut": 1}, 3)
    assert (row["tokens"], row["cached_tokens"], row["temperature"]) == (60, 5, 1.0)


def test_a_setting_that_never_answered_still_has_its_row() -> None:
    (row,) = rows(by_cell([Served("off", Cell("math", 0.0, 4), 0, (loop(failed(), failed()),))]))
    assert (row["requests"], row["failed"]) == (2, 2)
    assert "tokens_per_second" not in row


def test_regret_is_what_the_best_of_each_question_would_have_given() -> None:
    found = ratio(measured(streams=1), "tokens_per_second", "adaptive", BEST, 1)["workloads"]
    assert found["math"]["regret"] == pytest.approx(0.1)
    assert found["chat"]["regret"] == pytest.approx(1 - 15 / 12)
    assert "regret" not in ratio(measured(), "tokens_per_second", "adaptive", BEST)["workloads"]["math"]
