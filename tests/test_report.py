"""The study's report from canned results: verdicts, tables, and a page with its plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taps.cli import main
from taps.evaluation.claims import claims, compare, compare_means, depth_shift
from taps.evaluation.plots import acceptance_bars
from taps.evaluation.results import InvalidResults, Key, blends, load_live, load_results, row_of
from taps.evaluation.tables import (
    PER_QUESTION,
    acceptance_table,
    averaging_table,
    coupling_table,
    heads_table,
    lengths,
    live_table,
    means_table,
    routing_table,
    speeds,
)

LENGTHS = {
    "math-hass": 3.0,
    "chat-hass": 2.0,
    "confidence": 2.8,
    "entropy": 2.7,
    "merged": 3.2,
    "concatenated": 3.3,
}


def canned(
    benchmark: str = "gsm8k", temperature: float = 0.0, lengths: dict[str, float] | None = None
) -> dict[str, Any]:
    """A result whose strategies have the given acceptance lengths on each of twenty questions."""
    bins = {"accepted": [1] * 20, "rejected": [2] * 20}
    analysis = {
        "nodes": [40] * 20, "hits": list(range(1, 21)), "probability": [2.0 * i + 1 for i in range(20)],
        "confidence": bins, "entropy": bins, "tree_confidence": bins,
    }  # fmt: skip
    rows = [
        {
            "strategy": name, "drafters": ["math-hass"], "coupled": coupled, "num_nodes": 60,
            "acceptance_length": length + 0.5 * coupled,
            "interval_95": [length + 0.5 * coupled - 0.1, length + 0.5 * coupled + 0.1],
            "per_question_mean": length + 0.05, "nodes_per_pass": 59.0, "histogram": [10, 20, 10],
            "per_question_interval_95": [length - 0.05, length + 0.15],
            "question_depths": [{"math-hass": [5, 40, 55 + i], "chat-hass": [5, 20, 20]} for i in range(11)],
            "chosen": {"math-hass": 30, "chat-hass": 10},
            "questions": [[round(100 * (length + 0.5 * coupled)) * (i + 1), 100 * (i + 1)] for i in range(20)],
        }
        for coupled in ((False, True) if temperature else (False,))
        for name, length in (LENGTHS | (lengths or {})).items()
    ]  # fmt: skip
    plan = {
        "benchmark": benchmark, "questions": 20, "new_tokens": 128, "temperature": temperature,
        "num_nodes": 60, "depth": 5, "top_k": 10,
    }  # fmt: skip
    training = {"training": {"method": "hass", "epochs": 1}, "answer_tokens": 2000, "prompts": "rows"}
    heads: dict[str, Any] = {
        "math-hass": training | {"init": "made/math-eagle-2"}, "chat-hass": training | {"init": None}
    }  # fmt: skip
    return {"plan": plan, "heads": heads, "rows": rows, "analysis": dict.fromkeys(heads, analysis)}


KEY = Key("hass", "gsm8k", 0.0)


def verdict(result: dict[str, Any], about: str) -> str:
    (claim,) = (claim for claim in claims({KEY: result}) if about in claim.statement)
    return claim.verdict


def test_a_clear_difference_reproduces_a_claim_or_refutes_it() -> None:
    assert verdict(canned(), "specialises") == "reproduced"
    assert verdict(canned(lengths={"chat-hass": 3.4}), "specialises") == "not reproduced: 1 of 1 against it"
    assert verdict(canned(), "beats each specialist") == "holds"
    assert (
        verdict(canned(lengths={"merged": 2.1}), "of one tree reaches 0.97")
        == "does not hold: 1 of 1 against it"
    )


def test_a_claim_that_nothing_measures_says_so() -> None:
    assert verdict(canned(), "Averaging") == "not measurable here"


def test_an_interval_around_one_decides_nothing() -> None:
    noisy = canned(lengths={"entropy": 2.8})
    for i, question in enumerate(next(r for r in noisy["rows"] if r["strategy"] == "entropy")["questions"]):
        question[0] += (-1) ** i * question[1] // 5
    assert verdict(noisy, "Confidence routes better") == "not reproduced: every interval includes 1"
    (claim,) = (c for c in claims({KEY: noisy, Key("hass", "svamp", 0.0): canned()}) if "routes" in c.statement)
    assert claim.verdict == "reproduced in 1 of 2, the others undecided"


def test_a_comparison_pairs_questions_and_names_heads_without_their_method() -> None:
    comparison = compare(KEY, canned(), "math", "chat")
    assert comparison is not None
    assert comparison.ratio == pytest.approx(1.5)
    assert comparison.interval == pytest.approx((1.5, 1.5))
    assert compare(KEY, canned(), "math", "code") is None


def test_the_share_of_the_specialist_deep_down_is_compared_with_its_share_at_the_top() -> None:
    shift = depth_shift(KEY, canned())
    assert shift is not None
    assert shift.ratio == pytest.approx((660 / 880) / (55 / 110))
    assert 1.47 < shift.interval.low < shift.ratio < shift.interval.high < 1.53
    assert verdict(canned(), "Depth shifts") == "reproduced"
    assert depth_shift(Key("hass", "humaneval", 0.0), canned("humaneval")) is None


def test_means_over_benchmarks_are_compared_with_a_paired_interval() -> None:
    other = Key("hass", "mt_bench", 0.0)
    results = {KEY: canned(), other: canned("mt_bench", lengths={"merged": 2.2})}
    comparison = compare_means(results, "hass", 0.0, "merged", "math")
    assert comparison is not None
    assert comparison.ratio == pytest.approx((3.2 + 2.2) / 6.0)
    assert comparison.interval == pytest.approx((0.9, 0.9))
    assert comparison.holds() is False
    assert comparison.holds(share=0.89) is True
    assert comparison.holds(share=0.9) is None
    assert compare_means(results, "hass", 0.0, "merged", "mixed-half") is None


def test_adapted_specialists_are_compared_with_the_mixed_head_apart() -> None:
    rows = {"mixed-full-hass": 3.0}
    results = {KEY: canned(lengths=rows), Key("adapted", "gsm8k", 0.0): canned(lengths=rows | {"merged": 2.9})}
    found = {claim.statement.split(",")[0]: claim for claim in claims(results)}
    ((ratio,), (adapted,)) = (
        [c.ratio for c in claim.comparisons]
        for name, claim in found.items()
        if name == "The same" or "beats the mixed heads" in claim.statement
    )
    assert [ratio, adapted] == pytest.approx([3.2 / 3.0, 2.9 / 3.0])


def test_a_row_of_another_size_is_found_by_its_size() -> None:
    result = canned()
    result["rows"].append(result["rows"][0] | {"num_nodes": 8, "acceptance_length": 2.5})
    assert row_of(result, "math") == result["rows"][0]
    small = row_of(result, "math", num_nodes=8)
    assert small is not None
    assert small["acceptance_length"] == 2.5
    assert "| math | 8 | 2.50" in acceptance_table({KEY: result}, "hass", 0.0)


def test_the_tables_hold_what_was_measured() -> None:
    results = {KEY: canned(), Key("hass", "gsm8k", 1.0): canned(temperature=1.0)}
    assert "| merged | 60 | 3.20 (3.10 to 3.30) | 3.20 |" in acceptance_table(results, "hass", 0.0)
    per_question = acceptance_table(results, "hass", 0.0, measure=PER_QUESTION)
    assert "| merged | 60 | 3.25 (3.15 to 3.35) | 3.25 |" in per_question
    assert "| math | 3.00 (2.90 to 3.10) | 3.50 (3.40 to 3.60) | +16.7% (+16.7% to +16.7%) |" in coupling_table(
        results
    )
    assert "| confidence | math 75%, chat 25% |" in routing_table(results)


def test_the_summary_holds_means_over_benchmarks_and_speeds() -> None:
    other = canned("mt_bench", lengths={"merged": 2.2, "averaged-hass": 1.5})
    other["rows"].append(other["rows"][0] | {"num_nodes": 8, "acceptance_length": 9.0})
    row = {
        "strategy": "merged", "speed_ratio_median": 1.5, "speed_ratios": [1.4, 1.5, 1.5, 1.7],
        "coupled": False,
        "nodes_per_pass": 8, "acceptance_length": 3.0, "draft_ms": 12.4, "verify_ms": 60.0,
    }  # fmt: skip
    live = {KEY: {"rows": [row | {"tokens_per_second_median": 81.6}]}}
    found = means_table(lengths({KEY: canned(), Key("hass", "mt_bench", 0.0): other}), 2)
    assert "| strategy | hass, T = 0 |" in found
    assert "| math | 3.00 |" in found
    assert "| merged | 2.70 |" in found
    assert "averaged" not in found, "measured on one of two"
    assert means_table(speeds(live), 2).splitlines()[::2] == [
        "| strategy | hass, T = 0 (1 of 2 benchmarks) |",
        "| merged | 1.50 |",
    ]
    assert "| hass | gsm8k | 0 | merged | 1.50 (1.48 to 1.55) | 82 | 3.00 | 12 | 60 | 8.0 |" in live_table(live)


def test_results_are_told_apart_by_how_the_heads_they_combine_were_trained(tmp_path: Path) -> None:
    adapted = json.loads(json.dumps(canned()).replace("-hass", "-adapted"))
    adapted["heads"]["mixed-hass"] = canned()["heads"]["math-hass"]
    plain = json.loads(json.dumps(canned()).replace("-hass", ""))
    for i, result in enumerate((adapted, canned(), plain | {"plan": plain["plan"] | {"benchmark": "svamp"}})):
        (tmp_path / f"eval-{i}.json").write_text(json.dumps(result))
    assert list(load_results(tmp_path)) == [
        ("hass", "gsm8k", 0.0),
        ("hass", "svamp", 0.0),
        ("adapted", "gsm8k", 0.0),
    ]


def test_the_heads_table_says_what_each_was_made_from() -> None:
    lines = heads_table({KEY: canned()}, {}).splitlines()
    assert lines[2:] == [
        "| math-hass | hass, epochs: 1 | math-eagle-2 | rows | 2,000 |  | all |",
        "| chat-hass | hass, epochs: 1 |  | rows | 2,000 |  | all |",
    ]


def test_a_head_that_was_trained_again_says_what_each_of_them_measured() -> None:
    again, key = canned("svamp"), Key("hass", "svamp", 0.0)
    again["heads"]["math-hass"] |= {"held_out": {"acceptance_length": 1.9412}}
    lines = heads_table({KEY: canned(), key: again}, {key: again}).splitlines()
    assert lines[2:] == [
        "| math-hass | hass, epochs: 1 | math-eagle-2 | rows | 2,000 |  | τ at T = 0: gsm8k |",
        "| math-hass | hass, epochs: 1 | math-eagle-2 | rows | 2,000 | 1.941 "
        "| τ at T = 0: svamp; speed at T = 0: svamp |",
        "| chat-hass | hass, epochs: 1 |  | rows | 2,000 |  | all |",
    ]


def test_averages_stand_between_their_heads_by_weight() -> None:
    result = canned(lengths={"averaged-hass": 1.5, "averaged-0.2-hass": 1.8})
    for name, weight in (("averaged-hass", 0.5), ("averaged-0.2-hass", 0.2)):
        result["heads"][name] = {"averaged": {"made/math-hass": weight, "made/chat-hass": 1 - weight}}
    assert [(b.heads, b.weight, b.row["acceptance_length"]) for b in blends(result)] == [
        (("math", "chat"), 0.0, 2.0),
        (("math", "chat"), 0.2, 1.8),
        (("math", "chat"), 0.5, 1.5),
        (("math", "chat"), 1.0, 3.0),
    ]
    assert "| math and chat | 0.2 | 1.80 (1.70 to 1.90) |" in averaging_table({KEY: result})
    assert verdict(result, "Averaging") == "reproduced"
    assert blends(canned()) == []


def test_no_bar_is_cut_off() -> None:
    results = {KEY: canned(), Key("hass", "mt_bench", 0.0): canned("mt_bench", lengths={"merged": 9.0})}
    figure = acceptance_bars(results)
    assert all(axis.get_ylim()[0] == 1 and axis.get_ylim()[1] > 9 for axis in figure.axes)


def test_one_command_writes_the_page_and_every_plot_it_shows(tmp_path: Path) -> None:
    source = tmp_path / "results"
    source.mkdir()
    for benchmark in ("gsm8k", "mt_bench"):
        for temperature in (0.0, 1.0):
            name = f"eval-{benchmark}-t{temperature:g}.json"
            result = canned(benchmark, temperature, {"averaged-hass": 1.5})
            result["heads"]["averaged-hass"] = {"averaged": {"math-hass": 0.5, "chat-hass": 0.5}}
            (source / name).write_text(json.dumps(result))
    row = {
        "strategy": "merged", "drafters": ["math-hass", "chat-hass"], "coupled": False,
        "tokens_per_second_median": 81.6,
        "speed_ratio_median": 1.5, "speed_ratios": [1.4, 1.5, 1.7], "nodes_per_pass": 8,
        "acceptance_length": 3.0, "draft_ms": 12.4, "verify_ms": 60.0,
    }  # fmt: skip
    live = canned() | {"rows": [row], "threads": 2, "made_with": {"device": "cpu"}}
    (source / "live-gsm8k-t0.json").write_text(json.dumps(live))
    assert main(["report", "--results", str(source), "--out", str(tmp_path / "study")]) == 0
    page = (tmp_path / "study" / "README.md").read_text()
    plots = {path.name for path in (tmp_path / "study").glob("*.svg")}
    assert len(plots) == 12
    assert all(f"]({name})" in page for name in plots)
    assert "20 of mt_bench, 20 of gsm8k, at most 128 new tokens a turn" in page
    assert "one stream on 2 threads (cpu), trees of 60 nodes" in page
    assert page.index("mt_bench") < page.index("gsm8k", page.index("## Acceptance length"))


def test_results_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidResults, match="holds no eval"):
        load_results(tmp_path)
    (tmp_path / "eval-a.json").write_text("{}")
    with pytest.raises(InvalidResults, match=r"eval-a\.json is not a result"):
        load_results(tmp_path)
    (tmp_path / "eval-a.json").write_text(json.dumps(canned()))
    (tmp_path / "eval-b.json").write_text(json.dumps(canned()))
    with pytest.raises(InvalidResults, match="a second time"):
        load_results(tmp_path)
    other = canned("mt_bench")
    (tmp_path / "eval-b.json").write_text(json.dumps(other | {"plan": other["plan"] | {"depth": 6}}))
    with pytest.raises(InvalidResults, match=r"eval-a.*eval-b.* differ in their trees"):
        load_results(tmp_path)
    (tmp_path / "eval-b.json").write_text(json.dumps(other | {"heads": other["heads"] | {"math-eagle-2": {}}}))
    with pytest.raises(InvalidResults, match="two heads that are both reported as math"):
        load_results(tmp_path)
    (tmp_path / "eval-b.json").unlink()
    (tmp_path / "live-a.json").write_text("half a")
    with pytest.raises(InvalidResults, match=r"live-a\.json is not a result"):
        load_live(tmp_path)
