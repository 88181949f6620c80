"""Generating answers: resumed, cut where they end, asked again when prompts are few, and the target's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from jinja2 import TemplateError

from taps.drafting.batched import BatchedDrafter
from taps.drafting.eagle import EagleDrafter
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.models.causal_lm import CausalLM
from taps.recording.answers import AnswerRecipe, is_complete, num_answered, refuse_other_answers
from taps.recording.features import TargetFeatures
from taps.recording.recorder import AnswerRecorder, answer_prompts, answer_sources
from taps.recording.shards import Recording, load_shard, shards
from taps.recording.sources import InvalidData, Prompt
from tests.tiny import VOCAB, tiny_head, tiny_target

RECIPE = AnswerRecipe(max_new_tokens=12, max_prompt_tokens=10, answers_per_prompt=1, sessions=3, shard_size=2)
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "x" * (i + 2)},)) for i in range(6)]


class Tokenizer:
    """Ids from lengths: enough of a tokenizer for the recorder."""

    def apply_chat_template(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> Any:
        length = len(messages[-1]["content"])
        if messages[0]["role"] == "system":
            raise TemplateError("no system messages")
        return {"input_ids": [(31 * length + 7 * i) % VOCAB for i in range(length)]}


def record(
    directory: Path,
    recipe: AnswerRecipe = RECIPE,
    ends: frozenset[int] = frozenset(),
    drafters: Sequence[BatchedDrafter] = (),
    prompts: Sequence[Prompt] = PROMPTS,
) -> dict[str, Recording]:
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 3, 64, StepBudget(16, 32)))
    tokenizer: Any = Tokenizer()
    try:
        AnswerRecorder(verifier, tokenizer, directory, recipe, ends, drafters, made_by="us").run(prompts)
    finally:
        verifier.close()
    return {r.id: r for path in shards(directory) for r in load_shard(path)}


def texts(recorded: dict[str, Recording]) -> dict[str, list[int]]:
    return {name: r.tokens.tolist() for name, r in recorded.items()}


def test_every_prompt_is_answered_with_features_of_all_but_the_newest_token(tmp_path: Path) -> None:
    recorded = record(tmp_path)
    assert set(recorded) == {prompt.id for prompt in PROMPTS}
    assert all(r.num_answer_tokens == 12 and len(r.features) == len(r.tokens) - 1 for r in recorded.values())


def test_what_is_recorded_is_not_generated_again(tmp_path: Path) -> None:
    half = replace(RECIPE, answer_tokens=30)
    first = record(tmp_path, half)
    assert 30 <= 12 * len(first) < 12 * len(PROMPTS)
    resumed = record(tmp_path)
    assert texts(resumed) == texts(record(tmp_path / "unbroken"))
    assert {name: texts(resumed)[name] for name in first} == texts(first)


@pytest.mark.parametrize("kept", [(0, 1, 2, 4), (0, 3, 4), (2, 3, 5)])
def test_what_a_killed_run_was_answering_is_answered_though_there_is_enough(
    kept: Sequence[int], tmp_path: Path
) -> None:
    enough, tokenizer = replace(RECIPE, answer_tokens=12 * len(kept)), Tokenizer()
    record(tmp_path, replace(RECIPE, sessions=1), prompts=[PROMPTS[i] for i in kept])
    assert not is_complete(tmp_path, tokenizer, PROMPTS, enough)
    assert set(record(tmp_path, enough)) == {prompt.id for prompt in PROMPTS[: max(kept) + 1]}
    assert is_complete(tmp_path, tokenizer, PROMPTS, enough)
    assert is_complete(tmp_path, tokenizer, PROMPTS, replace(RECIPE, max_prompt_tokens=max(kept) + 2))
    assert is_complete(tmp_path, tokenizer, PROMPTS, RECIPE) == (max(kept) == 5)


def test_prompts_that_are_left_out_do_not_stand_before_those_a_killed_run_left(tmp_path: Path) -> None:
    """Two too long ones come first, and only one is answered at once."""
    prompts = [PROMPTS[5], PROMPTS[4], PROMPTS[0], PROMPTS[1]]
    enough = replace(RECIPE, answer_tokens=12, sessions=1, max_prompt_tokens=5)
    record(tmp_path, enough, prompts=prompts[3:])
    assert set(record(tmp_path, enough, prompts=prompts)) == {"p0", "p1"}


def test_prompts_that_were_added_since_are_not_answered_when_there_is_enough(tmp_path: Path) -> None:
    record(tmp_path, prompts=PROMPTS[4:])
    enough = replace(RECIPE, answer_tokens=24, sessions=1)
    assert is_complete(tmp_path, Tokenizer(), PROMPTS, enough), "four are missing, a kill leaves at most three"
    assert set(record(tmp_path, enough)) == {"p4", "p5"}


def test_progress_counts_the_tokens_of_unfinished_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("taps.recording.recorder._PROGRESS_INTERVAL_S", 0.0)
    record(tmp_path, replace(RECIPE, answer_tokens=72))
    counts = [
        int(count)
        for count in re.findall(r"answers: (\d+) of 72 tokens, \d+ tokens/s", capsys.readouterr().out)
    ]
    assert counts == sorted(counts)
    assert any(0 < count < RECIPE.max_new_tokens for count in counts)


def test_an_answer_ends_with_its_end_token(tmp_path: Path) -> None:
    whole = record(tmp_path / "whole")["p3"]
    end = int(whole.tokens[whole.answer_start + 4])
    cut = record(tmp_path / "cut", ends=frozenset((VOCAB, end)))["p3"]
    answer = cut.tokens[cut.answer_start :].tolist()
    assert answer.index(end) == len(answer) - 1
    assert torch.equal(cut.tokens, whole.tokens[: len(cut.tokens)])


def test_prompts_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    assert set(record(tmp_path, replace(RECIPE, max_prompt_tokens=4))) == {"p0", "p1", "p2"}


def test_prompts_left_out_are_counted_though_nothing_is_left_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(RECIPE, max_prompt_tokens=4)
    record(tmp_path, recipe)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: Tokenizer())
    monkeypatch.setattr("taps.recording.recorder.target_fingerprint", lambda _: "us")
    capsys.readouterr()
    answer_prompts("target", PROMPTS, tmp_path, recipe)
    assert capsys.readouterr().out == "answers: 3 prompts were left out: more than 4 tokens\n"
    answer_prompts("target", PROMPTS, tmp_path, replace(recipe, answer_tokens=36))
    assert capsys.readouterr().out == "", "there is enough: what is left was not asked for"


def test_a_source_none_of_whose_prompts_can_be_answered_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.jsonl").write_text('{"instruction": "longer than ten tokens"}')
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: Tokenizer())
    monkeypatch.setattr("taps.recording.recorder.target_fingerprint", lambda _: "us")
    monkeypatch.setattr("taps.recording.recorder.target_path", lambda name: name)
    with pytest.raises(InvalidData, match=r"none of the prompts of .*long\.jsonl can be answered"):
        answer_sources(str(tmp_path / "long.jsonl"), "target", tmp_path / "answers", RECIPE)


def test_few_prompts_are_answered_several_times_with_other_noise(tmp_path: Path) -> None:
    recorded = record(tmp_path, replace(RECIPE, answers_per_prompt=3))
    assert set(recorded) == {f"p{i}{turn}" for i in range(6) for turn in ("", "#1", "#2")}
    assert recorded["p0#1"].tokens.tolist() != recorded["p0#2"].tokens.tolist()


def test_a_sampled_answer_does_not_depend_on_what_else_is_answered(tmp_path: Path) -> None:
    sampled = replace(RECIPE, temperatures=(1.0,))
    every, one = record(tmp_path / "every", sampled), record(tmp_path / "one", sampled, prompts=PROMPTS[3:4])
    assert torch.equal(one["p3"].tokens, every["p3"].tokens)


def test_answers_of_another_target_or_to_other_prompts_are_not_taken_for_these(tmp_path: Path) -> None:
    record(tmp_path)
    tokenizer = Tokenizer()
    refuse_other_answers(tmp_path, "us", tokenizer, [*PROMPTS[:3], Prompt("new", PROMPTS[0].messages)], RECIPE)
    with pytest.raises(InvalidData, match="of another target"):
        refuse_other_answers(tmp_path, "them", tokenizer, PROMPTS, RECIPE)
    with pytest.raises(InvalidData, match="another prompt with the id p1"):
        refuse_other_answers(tmp_path, "us", tokenizer, [Prompt("p1", PROMPTS[2].messages)], RECIPE)
    with pytest.raises(InvalidData, match="made with max_new_tokens 12, not 13"):
        refuse_other_answers(tmp_path, "us", tokenizer, PROMPTS, replace(RECIPE, max_new_tokens=13))


def test_answers_to_other_prompts_do_not_count(tmp_path: Path) -> None:
    record(tmp_path, prompts=PROMPTS[:3])
    assert num_answered(tmp_path, PROMPTS[2:]) == 12
    assert set(record(tmp_path, replace(RECIPE, answer_tokens=36, sessions=1), prompts=PROMPTS[2:])) == {
        f"p{i}" for i in range(5)
    }


def test_what_the_chat_template_refuses_is_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = Prompt("p", ({"role": "system", "content": "be kind"}, *PROMPTS[0].messages))
    twice = replace(RECIPE, answers_per_prompt=2, temperatures=(1.0,))
    assert {name.partition("#")[0] for name in record(tmp_path, twice, prompts=[refused, *PROMPTS])} == {
        prompt.id for prompt in PROMPTS
    }
    assert "1 prompts were left out: no system messages" in capsys.readouterr().out


def test_two_processes_do_not_record_into_one_directory(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(InvalidData, match="another process is recording"):
        record(tmp_path)


def test_a_shard_that_is_gone_is_made_again_and_none_is_overwritten(tmp_path: Path) -> None:
    before = record(tmp_path)
    shards(tmp_path)[1].unlink()
    assert texts(record(tmp_path)) == texts(before)
    assert [path.stem for path in shards(tmp_path)] == ["shard-00000", "shard-00002", "shard-00003"]


def test_greedy_answers_are_not_repeated(tmp_path: Path) -> None:
    recorded = record(tmp_path, replace(RECIPE, answers_per_prompt=3, temperatures=(0.0,)))
    assert set(recorded) == {prompt.id for prompt in PROMPTS}


@pytest.mark.parametrize("ends", [frozenset(), frozenset((5,))])
def test_speculative_generation_records_the_same(tmp_path: Path, ends: frozenset[int]) -> None:
    drafter = BatchedDrafter("head", EagleDrafter(tiny_head(), 3, 256))
    plain, speculative = (
        record(tmp_path / "plain", ends=ends),
        record(tmp_path / "fast", ends=ends, drafters=[drafter]),
    )
    assert texts(speculative) == texts(plain)
    for name, recording in plain.items():
        torch.testing.assert_close(speculative[name].features, recording.features, atol=1e-2, rtol=1e-2)


def test_features_that_were_not_kept_are_computed_the_same(tmp_path: Path) -> None:
    kept = record(tmp_path / "kept")
    bare = record(tmp_path / "bare", replace(RECIPE, keep_features=False))
    assert texts(bare) == texts(kept)
    assert not any(r.features.numel() for r in bare.values())
    names = sorted(bare)
    computed = TargetFeatures(CausalLM(tiny_target()))([bare[name] for name in names])
    for name, features in zip(names, computed, strict=True):
        torch.testing.assert_close(features, kept[name].features, atol=1e-2, rtol=1e-2)
