"""The check of answers of a given form: which schemas it asks for, and what it finds wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from llguidance.hf import from_tokenizer

from cluster.forms import PLAIN, Answer, Plan, Refused, Schema, fault_of, run, summary, usable

SKY = Schema(
    "sky.json", {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"]}
)


@pytest.fixture(scope="module")
def guided(tokenizer: Any) -> Any:
    return from_tokenizer(tokenizer)


def answer(tokenizer: Any, text: str, reason: str = "stop", seconds: float = 1.0) -> Answer:
    return Answer(text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), reason, seconds)


class Scripted:
    """Answers every schema with the same text; drafted twice as fast, and not always the same."""

    def __init__(self, tokenizer: Any, differs: bool = False) -> None:
        self._tokenizer = tokenizer
        self._differs = differs

    def ask(self, schema: Schema, temperature: float, strategy: str) -> Answer:
        if schema.name == "strange.json":
            raise Refused("response_format cannot be used: strange\nand so on")
        is_other = self._differs and strategy != PLAIN
        text = '{"sky": "grey"}' if is_other else '{"sky": "blue"}'
        return answer(self._tokenizer, text, seconds=2.0 if strategy == PLAIN else 1.0)


def test_schemas_that_cannot_be_asked_for_are_counted_by_why(tmp_path: Path) -> None:
    contents: dict[str, Any] = {
        "a/good.json": SKY.content,
        "anything.json": {"type": "object"},
        "far.json": {"$ref": "https://example.org/other.json"},
        "large.json": {"properties": {f"p{n}": {"type": "string"} for n in range(20_000)}},
        "near.json": {"$ref": "#/$defs/sky", "$defs": {"sky": SKY.content}},
        "wrong.json": {"type": "nonsense", "properties": {}},
    }
    (tmp_path / "a").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    left_out = Counter[str]()
    assert [schema.name for schema in usable(tmp_path, left_out)] == ["a/good.json", "near.json"]
    assert sorted(left_out) == [
        "it has more than 200000 characters", "it is no valid schema", "it is not JSON",
        "it refers to other schemas", "it says nothing of what is in an answer",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason", "says"),
    [
        ('{"sky": "blue"}', "stop", ""),
        ('{"sky": "blue"', "stop", "does not parse"),
        ('{"sky": "red"}', "stop", "does not validate"),
        ('{"sky": "gr', "length", ""),
        ('{"sky": 5', "length", "the grammar ends after"),
    ],
)
def test_an_answer_is_held_against_its_schema(
    guided: Any, tokenizer: Any, text: str, reason: str, says: str
) -> None:
    fault = fault_of(SKY, answer(tokenizer, text, reason), guided)
    assert says in fault
    assert bool(fault) == bool(says)


def test_as_many_are_asked_for_as_are_wanted_and_taken(guided: Any, tokenizer: Any) -> None:
    schemas = [SKY, Schema("strange.json", {}), *(SKY._replace(name=f"{n}.json") for n in range(50))]
    told = [*run(Scripted(tokenizer), guided, iter(schemas), Plan(40, streams=2))]
    rows, refused = told[-1]
    assert len(told) > 1
    assert len({row["schema"] for row in rows}) == 40
    assert refused == {"response_format cannot be used: strange": 1}
    found = summary(rows, ["adaptive"])
    assert [(one["temperature"], one["answers"]) for one in found] == [(0.0, 40), (1.0, 40)]
    assert not any(one["length"] or one["faults"] for one in found)
    assert all(one["speed"] == one["median_speed"] == {"adaptive": 2.0} for one in found)


def test_speculation_that_changes_a_text_is_a_fault(guided: Any, tokenizer: Any) -> None:
    [(rows, _)] = run(Scripted(tokenizer, differs=True), guided, iter([SKY]), Plan(1, [0.0]))
    assert rows[0]["faults"] == ["adaptive gives another text"]
