"""Ratios with intervals, calibration by hand, and a whole evaluation in small."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from taps.cli import main
from taps.composing import STRATEGIES
from taps.drafting.drafter import Ask, DraftJob
from taps.evaluation.analysis import DrafterAnalysis
from taps.evaluation.replay import Strategy, replay
from taps.evaluation.statistics import (
    QuestionCounts,
    bootstrap,
    bootstrap_ratio,
    per_question_mean,
    pooled,
)
from taps.evaluation.strategies import strategies_for
from taps.provenance import commit, unlike_names
from taps.recording.answers import prompt_tokens
from taps.recording.shards import Recording
from taps.recording.sources import Prompt
from taps.tree import ProposalTree
from tests.conftest import PROJECT
from tests.test_sources import written
from tests.tiny import tiny_head


@pytest.mark.parametrize(
    "arguments",
    [
        ["--questions", "0"], ["--new-tokens", "-1"], ["--temperature", "-0.5"], ["--temperature", "nan"],
        ["--top-k", "many"],
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--benchmark", "b", "--heads", "h", "--out", "o", *arguments])
    assert f"{arguments[0]}: {arguments[1]!r} is not a" in capsys.readouterr().err


def test_where_no_result_can_be_written_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--benchmark", "gsm8k", "--heads", "h", "--out", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_heads_that_results_could_not_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="two heads are called math"):
        unlike_names([Path("specialists/math"), Path("specialists/chat"), Path("old/math")])


def test_the_commit_is_unknown_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_acceptance_is_pooled_and_its_mean_per_question_is_another_number() -> None:
    questions = [QuestionCounts(10, 10), QuestionCounts(90, 30)]
    assert pooled(questions) == 100 / 40
    assert per_question_mean(questions) == 2.0


def test_the_interval_holds_the_ratio_and_shrinks_with_more_questions() -> None:
    few = [QuestionCounts(20 + i % 7, 10) for i in range(10)]
    low, high = bootstrap(few)
    assert low < pooled(few) < high
    narrow = bootstrap(few * 20)
    assert narrow.high - narrow.low < (high - low) / 2


def test_a_ratio_of_two_strategies_pairs_their_questions() -> None:
    """Questions differ much, the two strategies by exactly a tenth: the paired interval has no width."""
    theirs = [QuestionCounts(100 * (i + 1), 50) for i in range(10)]
    ours = [QuestionCounts(110 * (i + 1), 50) for i in range(10)]
    assert bootstrap_ratio(ours, theirs) == pytest.approx((1.1, 1.1))


def tree(*nodes: tuple[int, int, float], owner: int = 0) -> ProposalTree:
    """Nodes (token, parent, probability of the path)."""
    rows = [(token, parent, math.log(p), 1 << owner) for token, parent, p in nodes]
    return ProposalTree.ordered(9, rows, len(rows) + 1, [1.0] * (len(rows) + 1))


def text(*tokens: int) -> Recording:
    """A one-token prompt, the first decided token 9, and what follows."""
    return Recording("r", torch.tensor([0, 9, *tokens]), 1, torch.zeros(len(tokens) + 1, 1))


def test_nodes_on_the_targets_path_are_hits_in_the_bin_of_their_probability() -> None:
    analysis = DrafterAnalysis()
    drafted = tree((5, 0, 0.82), (6, 1, 0.61), (7, 0, 0.12), (8, 2, 0.02))
    analysis.observe_trees(text(5, 8), {2: drafted})
    assert (analysis.nodes[16], analysis.hits[16]) == (1, 1)
    assert (analysis.nodes[12], analysis.hits[12]) == (1, 0)
    assert (analysis.nodes[2], analysis.hits[2]) == (1, 0)
    assert sum(analysis.nodes) == 3, "the fourth lies beyond the recording"
    assert sum(analysis.tree_confidence["accepted"]) == 1
    assert analysis.tree_entropy["accepted"][2] == 1
    assert sum(analysis.tree_confidence["rejected"]) == 0


def test_likeliest_tokens_are_counted_by_their_probability_and_their_distributions_entropy() -> None:
    undecided = tiny_head(draft_vocab=torch.tensor([7, 5]))  # both at 0.5, the entropy is log 2
    undecided.fc.weight.data.zero_()
    tokens = torch.tensor([0, 9, 7, 5, 7])
    recording = Recording("r", tokens, 2, torch.ones(4, undecided.config.hidden_size))
    analysis = DrafterAnalysis()
    analysis.observe_tokens(undecided, [recording])
    assert (analysis.confidence["accepted"][10], analysis.confidence["rejected"][10]) == (2, 1)
    assert (analysis.entropy["accepted"][1], analysis.entropy["rejected"][1]) == (2, 1)


class Canned:
    """Implements `Drafter`: drafts by the number of tokens decided."""

    in_kernel = False

    def profile(self) -> dict[int, float]:
        return {}

    def __init__(self, trees: Mapping[int, ProposalTree]) -> None:
        self._trees = trees

    def open(self) -> None: ...

    def close(self, session: None) -> None: ...

    def step(self, jobs: Sequence[DraftJob]) -> list[ProposalTree | Exception | None]:
        return [self._trees[job.delta.end] for job in jobs]


def test_the_oracle_takes_the_drafter_that_is_right() -> None:
    wrong, right = tree((1, 0, 0.9), (2, 1, 0.9)), tree((5, 0, 0.5), (6, 1, 0.4))
    drafters = [Canned(dict.fromkeys(range(2, 5), wrong)), Canned({2: right, 3: wrong, 4: wrong})]
    strategies = [
        Strategy("confidence", (0, 1), STRATEGIES["confidence"], 3), Strategy("oracle", (0, 1), None, 3)
    ]  # fmt: skip
    (replayed,) = replay(drafters, [text(5, 6, 7)], [Ask()], strategies)
    confident, oracle = replayed.walks
    assert (oracle.counts.num_passes, oracle.chosen) == (1, {1: 1})
    assert (confident.counts.num_passes, confident.chosen) == (3, {0: 3})


def test_every_way_to_combine_is_a_row_and_heads_alone_are_not_combined() -> None:
    rows = {row.name: row for row in strategies_for(["math", "chat"], ["mixed"], 60)}
    assert list(rows) == [
        "math", "chat", "mixed", "confidence", "entropy", "merged", "oracle", "union", "concatenated",
    ]  # fmt: skip
    assert rows["mixed"].drafters == (2,)
    assert rows["merged"].drafters == (0, 1)
    assert rows["concatenated"].num_nodes == 119


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_an_evaluation_of_the_shipped_heads(temperature: str, tmp_path: Path) -> None:
    questions = [{"question_id": i, "turns": ["What is 2 + 2?", "And 3 + 3?"]} for i in range(2)]
    heads = [str(PROJECT / "specialists" / name) for name in ("math", "chat")]
    command = [
        "eval", "--benchmark", "small", "--data", str(written(tmp_path / "q.jsonl", *questions)),
        "--heads", *heads, "--new-tokens", "8", "--num-nodes", "8", "--depth", "2", "--top-k", "3",
        "--temperature", temperature, "--work", str(tmp_path), "--out", str(tmp_path / "result.json"),
    ]  # fmt: skip
    assert main(command) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {(row["strategy"], row["coupled"]): row for row in result["rows"]}
    assert {coupled for _, coupled in rows} == ({False} if temperature == "0" else {False, True})
    assert len({sum(tokens for tokens, _ in row["questions"]) for row in result["rows"]}) == 1
    assert all(len(row["questions"]) == 2 for row in result["rows"])
    assert result["questions"]["ids"] == ["0", "1"]
    assert all(len(head["weights_sha256"]) == 64 for head in result["heads"].values())
    assert rows["concatenated", False]["acceptance_length"] == rows["union", False]["acceptance_length"]
    assert rows["oracle", False]["acceptance_length"] >= rows["math", False]["acceptance_length"]
    assert sum(result["analysis"]["math"]["nodes"]) > 0


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_speed_is_a_ratio_to_plain_decoding_of_the_same_questions(
    temperature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Prompt] = []

    def tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
        asked.append(prompt)
        return prompt_tokens(tokenizer, prompt)

    monkeypatch.setattr("taps.evaluation.live.prompt_tokens", tokens)
    question = {"question_id": 1, "turns": ["What is 2 + 2?"], "system": "Be brief."}
    questions = written(tmp_path / "q.jsonl", question)
    head = str(PROJECT / "specialists" / "math")
    command = ["bench", "--benchmark", "small", "--data", str(questions), "--heads", head]
    command += ["--alone", str(PROJECT / "specialists" / "chat"), "--temperature", temperature]
    command += ["--new-tokens", "8", "--num-nodes", "4", "--out", str(tmp_path / "result.json")]
    assert main([*command, "--explain"]) == 0
    assert asked == [
        Prompt("1", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}))
    ]
    measured = json.loads((tmp_path / "result.json").read_text())["rows"]
    rows = {(row["strategy"], row["coupled"]): row for row in measured}
    speculative = ["math", "chat", "confidence", "entropy", "merged", "concatenated"]
    ways = [(name, coupled) for coupled in (False, True)[: 1 + int(temperature)] for name in speculative]
    served = ("adaptive", temperature == "1")
    assert list(rows) == [("off", False), *ways, served]
    explained = re.findall(
        r"^  asked (.*), depth .* accepted \d+: (\d+) tokens by", capsys.readouterr().out, re.M
    )
    assert sum(int(tokens) for _, tokens in explained) >= 7, "all but the prefill's"
    assert {name for name, _ in explained} <= {"nobody", "math", "math aside"}
    plain, math_head = rows["off", False], rows["math", False]
    assert (plain["speed_ratio_median"], plain["acceptance_length"]) == (1.0, 1.0)
    assert math_head["acceptance_length"] >= 1.0
    assert math_head["nodes_per_pass"] == 3.0
    assert math_head["draft_ms"] > 0
