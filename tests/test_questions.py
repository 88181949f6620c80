"""Questions: every format that is read, what is asked with them, and that results know which they were."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from taps.evaluation.questions import InvalidQuestions, Question, digest, load_questions
from taps.evaluation.recorded import EvaluationPlan, record
from taps.recording.answers import AnswerRecipe
from taps.recording.shards import Recording, save_shard
from taps.recording.sources import InvalidData, Prompt
from tests.test_sources import written

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
FORMATS = {
    "FastChat": ({"question_id": 81, "turns": ["One?", "Two?"]}, ("81", ("One?", "Two?"))),
    "messages": (
        {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        ("a", ("Hi",)),
    ),
    "GSM8K": ({"question": "How many?", "answer": "#### 4"}, ("0", ("How many?",))),
    "MATH-500": ({"problem": "Solve.", "answer": "1", "unique_id": "test/1"}, ("test/1", ("Solve.",))),
    "SVAMP": (
        {"ID": "c-1", "Body": "Tom has 3 hats .", "Question": "How many?", "Answer": "3"},
        ("c-1", ("Tom has 3 hats. How many?",)),
    ),
    "HumanEval": ({"task_id": "HumanEval/0", "prompt": "def f():"}, ("HumanEval/0", ("def f():",))),
    "MT-Bench": ({"prompt_id": 5, "prompt": ["One?", "Two?"]}, ("5", ("One?", "Two?"))),
}


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_read(row: Any, expected: tuple[str, tuple[str, ...]], tmp_path: Path) -> None:
    (question,) = load_questions(written(tmp_path / "q.jsonl", row))
    assert (question.id, question.turns) == expected


@pytest.mark.parametrize("name", ["q.json", "q.jsonl.gz"])
def test_questions_are_read_from_every_file_that_prompts_are(name: str, tmp_path: Path) -> None:
    asked = [row for row, _ in FORMATS.values()]
    text = json.dumps(asked) if name == "q.json" else "\r\n".join(map(json.dumps, asked))
    data = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    questions = load_questions(tmp_path / name)
    assert [question.turns for question in questions] == [turns for _, (_, turns) in FORMATS.values()]


def test_questions_without_a_system_message_keep_their_digest() -> None:
    """Committed results carry it."""
    turns = {"81": ("One?", "Two?"), "a": ("Hi",), "c-1": ("Tom has 3 hats. Café 😀 how many?",)}
    questions = [Question(name, said) for name, said in turns.items()]
    known = "278d34660818350d6311dc87cfdda6b34e51d49f8f13438780119ab63cfdf4c2"
    assert digest(questions) == known
    systems = {digest([replace(questions[0], system=text), *questions[1:]]) for text in ("", "Be brief.")}
    assert len({known, *systems}) == 3


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [SYSTEM, HI, {"role": "assistant", "content": "Hello"}, HI]}, ("Hi", "Hi")),
        ({"question_id": 1, "turns": ["Hi", "Hi"], "system": "Be brief."}, ("Hi", "Hi")),
        ({"system_prompt": "Be brief.", "question": "Hi"}, ("Hi",)),
        ({"instruction": "Bye", "history": [["Hi", "Hello"]], "system": "Be brief."}, ("Hi", "Bye")),
    ],
)
def test_a_question_is_asked_with_its_system_message(row: Any, turns: tuple[str, ...], tmp_path: Path) -> None:
    (question,) = load_questions(written(tmp_path / "q.jsonl", row))
    assert (question.system, question.turns) == ("Be brief.", turns)
    assert question.first_turn == [SYSTEM, HI]


def test_every_turn_is_recorded_with_the_system_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[dict[str, str]]] = []

    def answer(target: str, prompts: Sequence[Prompt], work: Path, recipe: AnswerRecipe) -> None:
        asked.extend(list(prompt.messages) for prompt in prompts)
        work.mkdir()
        answers = [Recording(p.id, torch.zeros(3, dtype=torch.int32), 1, torch.empty(0, 0)) for p in prompts]
        save_shard(work / "shard-00000.safetensors", answers)

    class Tokenizer:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return "Hello"

    monkeypatch.setattr("taps.evaluation.recorded.answer_prompts", answer)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: Tokenizer())
    plan = EvaluationPlan("b", 1, new_tokens=2, temperature=0.0, seed=0, num_nodes=2, depth=1, top_k=1)
    runs = record("target", [Question("a", ("Hi", "Bye"), "Be brief."), Question("b", ("Hi",))], tmp_path, plan)
    bye = {"role": "user", "content": "Bye"}
    assert asked == [[SYSTEM, HI], [HI], [SYSTEM, HI, {"role": "assistant", "content": "Hello"}, bye]]
    assert [run.question for run in runs] == ["a", "b", "a"]
    monkeypatch.setattr("taps.evaluation.recorded.answer_prompts", lambda *_: None)
    with pytest.raises(InvalidQuestions, match="none of the questions can be answered"):
        record("target", [Question("a", ("Hi",))], tmp_path / "none", plan)


@pytest.mark.parametrize(
    "row",
    [
        "3",
        "{}",
        '{"turns": []}',
        '{"turns": [5]}',
        '{"turns": ["", "Two?"]}',
        '{"question": ""}',
        '{"Body": "Tom", "Question": null}',
        r'{"question": "cut \ud83d"}',
        r'{"id": "\ud83d", "question": "One?"}',
        r'{"system": "\ud83d", "question": "One?"}',
        json.dumps({"messages": [HI, SYSTEM, HI]}),
        json.dumps({"messages": [SYSTEM, SYSTEM, HI]}),
    ],
)
def test_a_question_that_cannot_be_asked_is_left_out_with_its_line_and_why(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"question_id": 1, "turns": ["One?"]}
    (question,) = load_questions(written(tmp_path / "q.jsonl", good, row))
    assert question.id == "1"
    assert re.search(r"q\.jsonl: 1 row left out: .+ \(line 2\)\n$", capsys.readouterr().out)
    with pytest.raises(InvalidQuestions, match=r"holds no questions; expected \{"):
        load_questions(written(tmp_path / "q.jsonl", row))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"q\.jsonl, line 2: "):
        load_questions(written(tmp_path / "q.jsonl", '{"question": "One?"}', "not JSON"))


def test_a_question_without_an_id_is_numbered_among_all_rows(tmp_path: Path) -> None:
    rows: list[Any] = [
        "",
        {"question": "One?"},
        "{}",
        "",
        {"question": "Two?", "id": None},
        {"question": "Three?"},
    ]
    assert [q.id for q in load_questions(written(tmp_path / "q.jsonl", *rows))] == ["0", "2", "3"]


def test_questions_that_results_could_not_tell_apart_are_refused(tmp_path: Path) -> None:
    rows = ({"question_id": i, "turns": [f"{number}?"]} for number, i in enumerate((1, 2, 1)))
    with pytest.raises(InvalidQuestions, match="two questions with the id 1"):
        load_questions(written(tmp_path / "q.jsonl", *rows))


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidQuestions, match="holds no questions"):
        load_questions(written(tmp_path / "q.jsonl"))


def test_one_turn_need_not_be_a_list(tmp_path: Path) -> None:
    (question,) = load_questions(written(tmp_path / "q.jsonl", {"question_id": 1, "turns": "One?"}))
    assert question.turns == ("One?",)


def test_fewer_questions_are_spread_over_those_that_can_be_asked(tmp_path: Path) -> None:
    rows: list[Any] = [{"question_id": i, "turns": ["One?"]} for i in range(10)]
    path = written(tmp_path / "q.jsonl", *("{}",) * 30, *rows)
    assert [q.id for q in load_questions(path, 4)] == ["0", "2", "5", "7"]
    assert len(load_questions(path, 12)) == 10


def test_a_benchmark_is_read_from_the_hub_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(*where: Any, **options: Any) -> list[Any]:
            assert (where, options) == (("openai/gsm8k", "main"), {"split": "test", "streaming": True})
            return [{"question": "How many?"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert load_questions("gsm8k")[0].turns == ("How many?",)
    with pytest.raises(InvalidQuestions, match="neither a file nor one of mt_bench"):
        load_questions("nothing")
