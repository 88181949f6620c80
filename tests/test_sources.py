"""Prompts: every format that is read, mixtures, and refusals that say what is wrong."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from taps.recording.sources import InvalidData, load_prompts

USER = {"role": "user", "content": "hi"}


def written(path: Path, *rows: Any) -> Path:
    """JSON lines; a string goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def numbered(path: Path, count: int) -> Path:
    return written(path, *({"id": i, "messages": [USER | {"content": str(i)}]} for i in range(count)))


@pytest.mark.parametrize(
    "line",
    [
        "null", "[1]", "{}", '{"messages": [{"role": "user", "content": null}]}', '{"output": "4"}',
        '{"turns": ["One?", "Two?"]}',
        '{"conversations": [{"from": "human", "value": "hi"}, {"from": "observation", "value": "sunny"}]}',
        r'{"messages": [{"role": "user", "content": "cut \ud83d"}]}', r'{"id": "\ud83d", "instruction": "hi"}',
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_left_out_with_its_line_and_why(
    tmp_path: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "data.jsonl", {"messages": [USER]}, line)
    (prompt,) = load_prompts(path)
    assert (prompt.id, prompt.messages) == ("data.jsonl, line 1", (USER,))
    assert re.search(r"data\.jsonl: 1 row left out: .+ \(line 2\)\n$", capsys.readouterr().out)


@pytest.mark.parametrize("rows", [["", "  "], ['{"messages": []}'], ["[]"], ["3"], ['{"data": [1]}']])
def test_a_file_without_prompts_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(InvalidData, match=r"holds no prompts; expected \{"):
        load_prompts(written(tmp_path / "data.jsonl", *rows))


def test_rows_left_out_are_counted_though_what_follows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidData, match=r"data\.jsonl, line 3: "):
        load_prompts(written(tmp_path / "data.jsonl", "{}", {"messages": [USER]}, "not JSON"))
    assert "data.jsonl: 1 row left out" in capsys.readouterr().out


def test_what_begins_with_an_answer_is_used_and_what_asks_nothing_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the files that went around as ShareGPT have them."""
    empty = [
        {"id": "a", "conversations": []},
        {"id": "b", "conversations": [{"from": "chatgpt", "value": "hi"}]},
        {"id": "c", "conversations": [{"from": "human", "value": " "}, {"from": "bing", "value": "hi"}]},
        {"instruction": ""},
    ]
    cut = {"id": "d", "conversations": [{"from": "gpt", "value": "so"}, {"from": "human", "value": "why?"}]}
    (prompt,) = load_prompts(written(tmp_path / "data.jsonl", *empty, cut))
    assert prompt.messages == ({"role": "user", "content": "why?"},)
    said = capsys.readouterr().out
    assert "data.jsonl: 4 rows left out: no user says anything (lines 1, 2, 3, 4)" in said
    assert "data.jsonl: not read: answers that a conversation begins with" in said


def test_a_system_message_beside_the_turns_and_history_are_asked_with(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    beside = {"system": "Be brief.", "conversations": [{"from": "human", "value": "hi"}]}
    history = {"instruction": "bye", "input": "", "history": [["hi", "hello"]], "system": "Be brief."}
    path = written(tmp_path / "data.json", json.dumps([beside, history]))
    asked = {prompt.id: prompt.messages for prompt in load_prompts(path)}
    reply, bye = {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}
    assert asked == {"data.json, row 1": (system, USER), "data.json, row 2": (system, USER, reply, bye)}


def test_questions_of_a_benchmark_are_prompts_too(tmp_path: Path) -> None:
    rows: list[Any] = [{"question_id": 81, "turns": ["One?"]}, {"question": "Two?"}, {"problem": "Three?"}]
    prompts = load_prompts(written(tmp_path / "data.jsonl", *rows))
    assert {prompt.messages[0]["content"] for prompt in prompts} == {"One?", "Two?", "Three?"}


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"instruction": "café"}'.encode("latin-1"))
    with pytest.raises(InvalidData, match=r"data\.jsonl is not a text file in UTF-8"):
        load_prompts(path)
    path.write_text('{"instruction": "café"}', encoding="utf-8-sig")
    assert load_prompts(path)[0].messages[0]["content"] == "café"


def test_a_plus_in_the_name_of_a_file_is_not_a_mixture(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a+b.jsonl", 5)
    assert (len(load_prompts(path)), len(load_prompts(f"{path}:3"))) == (5, 3)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    row = {"messages": [USER | {"content": "one\u2028two\x85three"}]}
    (prompt,) = load_prompts(written(tmp_path / "data.jsonl", json.dumps(row, ensure_ascii=False)))
    assert prompt.messages[0]["content"] == "one\u2028two\x85three"


def test_reference_answers_are_dropped_and_earlier_turns_kept(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "hello"}
    row = {"id": 7, "messages": [USER, reply, USER | {"name": "x"}, reply]}
    (prompt,) = load_prompts(written(tmp_path / "data.jsonl", row, ""))
    assert prompt.id == "7"
    assert prompt.messages == (USER, reply, USER)


def test_sharegpt_rows_are_read_from_a_json_array(tmp_path: Path) -> None:
    said = [("system", "be kind"), ("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "bye")]
    rows = [{"id": "a", "conversations": [{"from": who, "value": what} for who, what in said]}]
    (prompt,) = load_prompts(written(tmp_path / "data.json", json.dumps(rows)))
    assert [(m["role"], m["content"]) for m in prompt.messages] == [
        ("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"),
    ]  # fmt: skip


def test_instruction_rows_are_read_with_and_without_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Sum 1, 1", "output": "2"},
    ]
    prompts = load_prompts(written(tmp_path / "data.jsonl", *rows))
    assert {p.messages[0]["content"] for p in prompts} == {"Add.\n\n2 and 2", "Sum 1, 1"}


def test_prompts_are_shuffled_by_the_seed_alone_and_keep_their_identity(tmp_path: Path) -> None:
    path = numbered(tmp_path / "data.jsonl", 20)
    first, second, other = load_prompts(path, 0), load_prompts(path, 0), load_prompts(path, 1)
    assert first == second != other
    assert sorted(prompt.id for prompt in first) == sorted(prompt.id for prompt in other)
    assert len({prompt.id for prompt in first}) == 20


def test_prompts_with_the_same_id_or_none_are_told_apart(tmp_path: Path) -> None:
    rows = [{"id": name, "messages": [USER]} for name in ("a", "a", "a~2", "b#3", None, None)]
    (tmp_path / "other").mkdir()
    path, copy = written(tmp_path / "x.jsonl", *rows), written(tmp_path / "other" / "x.jsonl", *rows)
    ids = {prompt.id for prompt in load_prompts(path)}
    assert ids == {"a", "a~2", "a~2~2", "b#3~", "x.jsonl, line 5", "x.jsonl, line 6"}
    assert ids == {prompt.id for prompt in load_prompts(copy)}, "whatever the folder is called"
    assert len({prompt.id for prompt in load_prompts(f"{path}+{copy}")}) == 12


def test_a_mixture_takes_so_many_of_each_source_and_keeps_them_apart(tmp_path: Path) -> None:
    math, chat = numbered(tmp_path / "math.jsonl", 20), numbered(tmp_path / "chat.jsonl", 30)
    mixed = load_prompts(f"{math}:5+{chat}:10")
    names = [prompt.id.partition("/")[0] for prompt in mixed]
    assert (names.count("math"), names.count("chat")) == (5, 10)
    assert len({prompt.id for prompt in mixed}) == 15
    assert names != sorted(names), "they are mixed, not one after the other"
    assert mixed == load_prompts(f"{math}:5 + {chat}:10")


def test_a_mixture_that_asks_for_more_than_there_is_is_refused(tmp_path: Path) -> None:
    math = numbered(tmp_path / "math.jsonl", 3)
    with pytest.raises(InvalidData, match="holds 3 prompts, 4 were asked for"):
        load_prompts(f"{math}:4")


def test_a_hub_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def shuffle(self, seed: int, buffer_size: int) -> Any:
            return ({"instruction": str(i), "output": ""} for i in range(10**9))

    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> Stream:
            assert (name, split, streaming) == ("TIGER-Lab/MathInstruct", "train", True)
            return Stream()

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    prompts = load_prompts("TIGER-Lab/MathInstruct:4")
    assert {prompt.messages[0]["content"] for prompt in prompts} == {"0", "1", "2", "3"}
    assert len({prompt.id for prompt in prompts}) == 4


def test_a_hub_dataset_of_another_kind_is_not_streamed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def shuffle(self, seed: int, buffer_size: int) -> Any:
            return ({"text": str(i)} for i in itertools.count())

    class Datasets:
        @staticmethod
        def load_dataset(*name: str, **options: Any) -> Stream:
            return Stream()

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    with pytest.raises(InvalidData, match="the first 1,000 rows of some/text cannot be used"):
        load_prompts("some/text:4")


def test_without_the_datasets_package_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidData, match="pip install datasets"):
        load_prompts("nobody/nothing:4")
