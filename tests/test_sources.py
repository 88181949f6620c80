"""Prompts: every format that is read, mixtures, and refusals that say what is wrong."""

from __future__ import annotations

import json
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
        "not JSON",
        "null",
        "[1]",
        '"text"',
        "{}",
        '{"messages": "hi"}',
        '{"messages": ["hi"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"conversations": [{"from": "bystander", "value": "hi"}]}',
        '{"conversations": [{"from": "human"}]}',
        '{"output": "4"}',
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_what_is_expected(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "data.jsonl", {"messages": [USER]}, line)
    with pytest.raises(InvalidData, match=r"data\.jsonl, line 2: .*expected \{"):
        load_prompts(path)


@pytest.mark.parametrize("rows", [["", "  "], ['{"messages": []}']])
def test_a_file_without_prompts_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(InvalidData, match="holds no prompts"):
        load_prompts(written(tmp_path / "data.jsonl", *rows))


def test_conversations_in_which_no_user_says_anything_are_left_out_and_counted(
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
    assert "data.jsonl: 4 rows in which no user says anything were left out" in capsys.readouterr().out


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


def test_a_broken_json_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="neither JSON nor JSON lines"):
        load_prompts(written(tmp_path / "data.json", '[{"messages": '))


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


def test_without_the_datasets_package_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidData, match="pip install datasets"):
        load_prompts("nobody/nothing:4")
