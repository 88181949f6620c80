"""`taps bench steps`: real steps of a tiny engine at the lengths they are said to have; floors by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from taps.cli import main
from taps.drafting.drafter import RESERVED_ROWS, Ask, DraftJob
from taps.drafting.eagle import EagleDrafter
from taps.engine.batching import Blocked
from taps.engine.jobs import Job, PrefillJob, VerifyJob
from taps.engine.scheduling import share_nodes
from taps.engine.target import Target
from taps.engine.threads import computing_with
from taps.evaluation import floors
from taps.evaluation.floors import Cost, Floor, Rates, TargetSize, floor_of, num_weights, target_size
from taps.evaluation.step_work import (
    DRIFT,
    Drafting,
    Prefilling,
    Text,
    Verifying,
    branching,
    decide,
    last_logits,
    write_texts,
)
from taps.evaluation.steps import Case, Timing, Work, fits, in_rounds, steps_table, tabulated, target_cases
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import save_head
from taps.sampling import sample
from taps.shaping import SamplingParams
from taps.verdict import Verdict
from tests.tiny import HIDDEN, VOCAB, saved_target, tiny_config, tiny_head, tiny_target

BODY = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48)
RATES = Rates(bytes_per_s=1e9, flops_per_s=1e12)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So little work is done alone, wherever others compute too."""
    with computing_with(1):
        yield


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return CausalLM(tiny_target())


@pytest.fixture(scope="module")
def texts(model: CausalLM) -> list[Text]:
    return write_texts(model, 3, 20 + DRIFT)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that name a tiny target and a head for it."""
    target = saved_target(tmp_path_factory.mktemp("target"))
    heads = tmp_path_factory.mktemp("heads")
    save_head(tiny_head(), heads / "one", {}, torch.bfloat16)
    return ["--target", str(target), "--head", str(heads / "one")]


@pytest.fixture(autouse=True)
def _small_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "SUM_BYTES", 1 << 16)


def test_a_floor_is_the_larger_of_memory_and_compute() -> None:
    assert floor_of(Cost(3e6, 1e9), RATES) == Floor(3.0, "memory")
    assert floor_of(Cost(3e6, 7e9), RATES) == Floor(7.0, "compute")


def test_weights_are_read_once_a_step_and_multiplied_for_every_row() -> None:
    size = TargetSize(body=1000, lm_head=200, position_bytes=10, itemsize=2)
    assert size.cost(rows=1, logit_rows=1, positions=0) == Cost(2400, 2400)
    assert size.cost(rows=8, logit_rows=8, positions=100) == Cost(3400, 19200)
    assert size.cost(rows=256, logit_rows=1, positions=0) == Cost(2400, 512400)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_counted_are_those_of_linear_layers(tied: bool) -> None:
    config = tiny_config()
    config.tie_word_embeddings = tied
    auto: Any = AutoModelForCausalLM
    size = target_size(auto.from_config(config, dtype=torch.bfloat16))
    assert size == TargetSize(BODY, VOCAB * HIDDEN, 2 * 2 * 2 * 8 * 2, 2)


def test_a_heads_weights_are_its_layer_its_input_and_its_draft_vocabulary() -> None:
    head = tiny_head(draft_vocab=torch.arange(10))
    assert num_weights(head) == 2 * HIDDEN * HIDDEN + BODY // 2 + 10 * HIDDEN


@pytest.mark.parametrize("rows", [1, 2, 8, 60])
def test_branching_trees_are_trees_of_as_many_rows_that_no_budget_of_theirs_cuts(rows: int) -> None:
    tree = branching(5, rows, 0, 1000).check()
    assert (len(tree), tree.tokens[0]) == (rows, 5)
    assert share_nodes([tree] * 3, 3 * (rows - 1)) == [tree] * 3
    assert all(len({tree.tokens[c] for c in children}) == len(children) for children in tree.children)


def test_a_text_has_a_feature_for_every_token_but_the_newest(texts: Sequence[Text]) -> None:
    for text in texts:
        assert len(text.tokens) == 20 + DRIFT + 1
        assert text.features.shape == (20 + DRIFT, HIDDEN)
    assert len({text.tokens for text in texts}) == len(texts)
    assert texts[0].first(100)[20 + DRIFT + 1 :] == texts[0].first(100 - 20 - DRIFT - 1)


class Spy:
    """What a step was asked for, and what came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.jobs: list[tuple[int, Job, Verdict | Exception | Blocked | None]] = []  # with the length before
        original = Target.step

        def step(target: Target, jobs: Sequence[Job]) -> list[Verdict | Exception | Blocked | None]:
            lengths = [job.session.sequence.length for job in jobs]
            results = original(target, jobs)
            self.jobs += zip(lengths, jobs, results, strict=True)
            return results

        monkeypatch.setattr(Target, "step", step)


def test_trees_are_verified_whole_at_about_the_stated_length_however_often(
    model: CausalLM, texts: Sequence[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, spy = Verifying(model, texts, 20, 21), Spy(monkeypatch)
    for _ in range(2 * DRIFT):
        assert sessions.step(1, 1) > 0
        assert sessions.step(3, 8) > 0
    seen = set()
    for length, job, verdict in spy.jobs:
        if isinstance(job, VerifyJob):
            assert isinstance(verdict, Verdict)
            assert (20 <= length < 20 + DRIFT + 8, verdict.num_nodes) == (True, len(job.tree) - 1)
            assert verdict.batch_size == (1 if len(job.tree) == 1 else 3)
            seen.add(id(job.session))
    assert len(seen) > 3, "sessions were opened again"


def test_a_prefill_is_one_step_behind_as_many_positions(
    model: CausalLM, texts: Sequence[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    for context in (0, 70):
        prompt, spy = Prefilling(model, texts[0], context, 32), Spy(monkeypatch)
        assert min(prompt.step(), prompt.step()) > 0
        lasts = [
            (length, len(job.state.tokens) - length, verdict is not None)
            for length, job, verdict in spy.jobs
            if isinstance(job, PrefillJob) and length == context
        ]
        assert lasts == [(context, 32, True)] * 2


def test_a_drafter_takes_in_a_token_a_step_and_starts_again_before_the_text_ends(
    texts: Sequence[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = EagleDrafter(tiny_head(), 3, 20 + DRIFT + RESERVED_ROWS)
    lengths: list[int] = []
    news: list[int] = []
    original = drafter.step

    def step(jobs: Sequence[DraftJob]) -> Any:
        trees = original(jobs)
        lengths.extend(job.session.sequence.length for job in jobs)
        news.extend(len(job.delta.tokens) for job in jobs)
        return trees

    monkeypatch.setattr(drafter, "step", step)
    sessions = Drafting(drafter, texts, 20, Ask(num_nodes=8, depth=2, top_k=4))
    for _ in range(DRIFT + 1):
        ms, trees = sessions.step()
        assert (ms > 0, [len(tree) for tree in trees]) == (True, [8] * 3)
    assert (min(lengths), max(lengths)) == (19, 19 + DRIFT)
    assert (news.count(20), news.count(1)) == (6, 3 * (DRIFT + 1))


def test_logits_to_decide_are_those_of_the_texts_last_positions(model: CausalLM, texts: Sequence[Text]) -> None:
    logits = last_logits(model, texts[0].first(6), 8)
    assert torch.equal(logits[0], logits[6])
    assert torch.equal(logits[5], last_logits(model, texts[0].first(1), 1)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_deciding_together_is_sampling_each(temperature: float) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature, choice=i) for i in range(4)]
    expected = [sample(row, p, 9, {}) for row, p in zip(logits, params, strict=True)]
    assert decide(logits, params, 9) == expected


def test_ratios_are_of_medians_to_the_floor_and_to_the_plain_step() -> None:
    def case(kind: str, sessions: int, rows: int, ms: Sequence[float]) -> tuple[Work, list[Timing]]:
        timings = [Timing(x, Cost(2e6, 1e9)) for x in ms]
        return Work(Case(kind, "", sessions, rows, 200), RATES, lambda: timings[0]), timings

    rows = tabulated([case("verify", 4, 1, [8.0]), case("verify", 1, 1, [4.0, 90.0, 3.0])])
    assert [(r["ms"], r["times_floor"], r["times_plain"]) for r in rows] == [(8.0, 4.0, 2.0), (4.0, 2.0, 1.0)]
    assert [(r["floor_ms"], r["bound"]) for r in rows] == [(2.0, "memory")] * 2


def test_every_case_has_its_turn_in_every_round_and_the_first_round_does_not_count() -> None:
    turns: list[int] = []

    def work(number: int) -> Work:
        def run() -> Timing:
            turns.append(number)
            return Timing(10.0 * number + turns.count(number), Cost(1, 1))

        return Work(Case("verify", "", 1, 1, number), RATES, run)

    found = in_rounds([work(number) for number in range(5)], 3)
    assert [[t.ms for t in timings] for _, timings in found] == [
        [10 * n + i for i in (2, 3, 4)] for n in range(5)
    ]
    rounds = [tuple(turns[i : i + 5]) for i in range(0, 20, 5)]
    assert [sorted(order) for order in rounds] == [list(range(5))] * 4
    assert len(set(rounds)) > 1, "the order changes"


def test_every_shape_is_verified_at_the_contexts_named_and_longer_ones_do_not_fit() -> None:
    usual, named = target_cases(None), target_cases((100, 300))
    assert (len(usual), len(named)) == (12, 18)
    assert {case.context for case in named if case.kind == "verify"} == {100, 300}
    assert all(fits(case, 2048) for case in usual)
    assert {(case.kind, case.context) for case in usual if not fits(case, 512)} == {
        ("verify", 1500), ("verify", 600), ("prefill", 1024),
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(checkpoints: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("results") / "steps.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "SUM_BYTES", 1 << 16)
        arguments = ["--repeats", "2", "--contexts", "16", "40", "--out", str(out)]
        assert main(["bench", "steps", *checkpoints, *arguments]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_every_step_is_timed_and_has_its_floor_and_ratios(measured: dict[str, Any]) -> None:
    steps = measured["steps"]
    kinds = [f"{step['kind']} {step['detail']}".strip() for step in steps]
    assert kinds == [
        *["verify"] * 16, "prefill", *["draft one"] * 2, *["decide T=0"] * 2, *["decide T=1"] * 2,
    ]  # fmt: skip
    for step in steps:
        assert len(step["all_ms"]) == 2
        assert min(step["ms"], step["floor_ms"], step["times_floor"], step["times_plain"]) >= 0
        assert step["bound"] in ("memory", "compute")
    assert steps[0]["times_plain"] == 1.0
    assert measured["skipped"] == ["prefill: 1 x 256 at 1024"]


def test_a_result_says_where_it_comes_from(measured: dict[str, Any]) -> None:
    floor, where = measured["floor"], measured["provenance"]
    assert floor["linear_weights"] == BODY + VOCAB * HIDDEN
    assert min(floor["gb_per_s"], floor["gflop_per_s"], floor["one_thread"]["gb_per_s"]) > 0
    assert where["plan"] == {"repeats": 2, "contexts": [16, 40], "dtype": "bfloat16", "threads": None}
    assert where["numerics"].endswith("exact")
    assert len(where["made_with"]["load"]) == 3
    assert list(where["heads"]) == ["one"]


def test_the_table_has_a_line_for_every_step_and_names_those_left_out(measured: dict[str, Any]) -> None:
    heading, table = steps_table(measured).split("\n\n")
    header, *lines, skipped = table.splitlines()
    assert len(lines) == len(measured["steps"])
    assert {len(line) for line in lines} == {len(header)}
    assert measured["provenance"]["numerics"] in heading
    assert skipped == "skipped, longer than the target: prefill: 1 x 256 at 1024"


def test_json_is_all_that_is_printed_where_it_is_asked_for(
    checkpoints: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--repeats", "1", "--contexts", "8", "--threads", "1", "--dtype", "float32", "--json"]
    with computing_with(2):
        assert main(["bench", "steps", *checkpoints, *arguments]) == 0
        threads = torch.get_num_threads()
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["steps", "skipped", "floor", "provenance"]
    assert (printed["provenance"]["threads"], threads) == (1, 2), "what it was before is back"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--contexts", "500"], "no step fits the target's 512 positions; name fewer with --contexts"),
        (["--out", "."], ". cannot be written; name another file for the result"),
        (["--head", "one", "two/one"], "two heads are called one: results could not tell them apart"),
        (["--head", "nowhere"], "nowhere"),
        (["--target", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_line(
    arguments: list[str], reason: str, checkpoints: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "steps", *checkpoints, *arguments]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("taps: ")]
    assert len(said) == 1
    assert reason in said[0]


@pytest.mark.parametrize("value", ["0", "-3", "many"])
@pytest.mark.parametrize("option", ["--repeats", "--contexts", "--threads"])
def test_counts_that_make_no_sense_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "steps", option, value])
    assert f"{option}: {value!r} is not a whole number" in capsys.readouterr().err


def test_bench_still_asks_for_its_own_options_and_names_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "taps bench: error: the following arguments are required: --benchmark" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "taps bench steps" in capsys.readouterr().out
