"""What rows ask: each form and its variants, and nothing that would change the question dropped unsaid."""

from __future__ import annotations

from typing import Any

import pytest

from taps.recording.conversations import Unusable, conversation, used_rows
from taps.recording.rows import InvalidData, Row

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
BRIEF = {"role": "system", "content": "Be brief."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def human(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


ASKED: dict[str, tuple[Any, list[Any]]] = {
    "messages": ({"messages": [BRIEF, HI, HELLO, HI, HELLO]}, [BRIEF, HI, HELLO, HI]),
    "ShareGPT": ({"conversations": [human("Hi"), {"from": "gpt", "value": "Hello"}]}, [HI]),
    "ShareGPT with roles": ({"conversations": [HI, HELLO, HI]}, [HI, HELLO, HI]),
    "messages with from": ({"messages": [human("Hi")]}, [HI]),
    "LMSYS": ({"conversation": [HI, HELLO], "turn": 1}, [HI]),
    "names of roles": (
        {"conversations": [{"from": "Developer", "value": "Be brief."}, {"from": " HUMAN", "value": "Hi"}]},
        [BRIEF, HI],
    ),
    "both names, one of them empty": ({"messages": [HI | {"from": None, "value": ""}]}, [HI]),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, "you", {"text": "there"}]}]},
        [{"role": "user", "content": "Hi\nyou\nthere"}],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "2, 2", "output": "4"}, ["Add.\n\n2, 2"]),
    "Dolly": ({"instruction": "Sum it up.", "context": "Long.", "response": "L."}, ["Sum it up.\n\nLong."]),
    "history": ({"instruction": "Hi", "input": "", "history": [["Hi", "Hello"]]}, [HI, HELLO, HI]),
    "history of turns": ({"prompt": "Hi", "history": [HI, HELLO]}, [HI, HELLO, HI]),
    "history and system": (
        {"instruction": "Hi", "history": [["Hi", "Hello"]], "system": "Be brief."}, [BRIEF, HI, HELLO, HI],
    ),
    "OpenOrca": ({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, [BRIEF, HI]),
    "FastChat": ({"turns": ["Hi", "Hi"]}, [HI, HI]),
    "one turn": ({"turns": "Hi"}, [HI]),
    "a number of turns": ({"turns": 3, "messages": None, "instruction": "Hi"}, [HI]),
    "SVAMP": ({"Body": "Tom has 3 hats .", "Question": "How many?"}, ["Tom has 3 hats. How many?"]),
    "a prompt of turns": ({"prompt": [BRIEF, HI], "completion": [HELLO]}, [BRIEF, HI]),
    "a system beside the turns": ({"conversations": [human("Hi")], "system": "Be brief."}, [BRIEF, HI]),
    "a system in parts": ({"messages": [HI], "system": [{"type": "text", "text": "Be brief."}]}, [BRIEF, HI]),
    "the same system twice": ({"messages": [BRIEF, HI], "system": "Be brief.\n"}, [BRIEF, HI]),
    "an empty system": ({"messages": [HI], "system": " ", "tools": "[]", "images": []}, [HI]),
    "a system before a cut conversation": ({"messages": [HELLO, HI], "system": "Be brief."}, [BRIEF, HI]),
    "empty fields of clients": ({"messages": [HI | {"tool_calls": None, "function_call": {}}]}, [HI]),
    "the form that says most": ({"prompt": "<s>Hi", "messages": [BRIEF, HI]}, [BRIEF, HI]),
    "the rendered prompt beside it": ({"prompt": "### Hi ### Hello", "instruction": "Hi"}, [HI]),
    "two names for one text": ({"question": "Hi", "problem": "Hi"}, [HI]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), ASKED.values(), ids=ASKED)
def test_a_form_is_read(row: Any, expected: list[Any]) -> None:
    messages = [{"role": "user", "content": m} if isinstance(m, str) else m for m in expected]
    assert list(conversation(row).messages) == messages


LEFT_OUT: dict[str, list[Any]] = {
    "not a JSON object": [None, 3, "Hi", ["Hi"], [HI]],
    "nothing is asked in any field that is known": [{}, {"output": "4"}, {"data": [HI]}, {"messages": "Hi"}],
    "no user says anything": [
        {"messages": []}, {"messages": [BRIEF, HELLO]}, {"conversations": [human(" ")]}, {"instruction": ""},
        {"turns": []}, {"prompt": []}, {"messages": [{"role": "user", "content": []}]},
    ],
    "a turn that is not an object": [{"messages": ["Hi"]}, {"conversations": [[HI]]}],
    "turns of somebody else than system, user and assistant": [
        {"messages": [{"content": "Hi"}]}, {"messages": [HI | {"role": 3}]},
        {"conversations": [human("Hi"), {"from": "bystander", "value": "Hm"}]},
    ],
    "turns of a tool": [
        {"messages": [HI, {"role": role, "content": None}]}
        for role in ("tool", "function", "Observation", "function_call")
    ],
    "calls of a tool": [
        {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        {"messages": [HI, HELLO | {"function_call": {"name": "f"}}]},
    ],
    "tools beside the text": [
        {"conversations": [human("Hi")], "tools": '[{"name": "f"}]'}, {"instruction": "Hi", "functions": [{}]},
    ],
    "images or sounds beside the text": [
        {"image": "cat.jpg", "conversations": [human("<image>\nWhat?")]},
        {"messages": [HI | {"images": ["x"]}]},
        {"messages": [{"role": "user", "content": [{"text": "Hi", "image_url": "x"}]}]},
    ],
    "parts that are not text": [
        {"messages": [{"role": "user", "content": content}]}
        for content in ([IMAGE], [["Hi"]], [None], [{"type": "text", "text": None}])
    ],
    "null where a text belongs": [
        {"messages": [{"role": "user", "content": None}]}, {"messages": [HI, {"role": "assistant"}]},
        {"conversations": [human(None)]}, {"turns": [None]}, {"Body": "Tom", "Question": None},
        {"instruction": "Hi", "history": [["Hi", None]]},
    ],
    "something else where a text belongs": [
        {"messages": [{"role": "user", "content": 5}]}, {"instruction": 5}, {"turns": [5]},
        {"messages": [HI], "system": 5}, {"question": "Hi", "context": {"a": "b"}},
    ],
    "two different system messages": [{"messages": [BRIEF, HI], "system": "Answer in French."}],
    "a system message after the last user's turn": [
        {"messages": [HI, BRIEF]}, {"messages": [HI, HELLO, BRIEF]},
    ],
    "instruction and question say different things": [{"instruction": "Answer in French.", "question": "Hi"}],
    "content and value say different things": [{"messages": [HI | {"value": "Hello"}]}],
    "choices beside the question": [{"question": "Hi", "choices": ["a", "b"]}],
    "a history that is not a list": [{"instruction": "Hi", "history": "Hi"}],
    "a history that is not pairs of two texts": [
        {"instruction": "Hi", "history": history} for history in (["Hi"], [["Hi"]])
    ],
    "history beside messages": [{"messages": [HI], "history": [["Hi", "Hello"]]}],
    "history beside turns": [{"turns": ["Hi"], "history": [["Hi", "Hello"]]}],
    "history, input or context beside several turns": [{"prompt": ["Hi", "Hi"], "input": "2, 2"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "row"), [(reason, row) for reason, rows in LEFT_OUT.items() for row in rows]
)
def test_a_row_that_cannot_be_used_says_why(reason: str, row: Any) -> None:
    with pytest.raises(Unusable) as refusal:
        conversation(row)
    assert str(refusal.value) == reason


@pytest.mark.parametrize(
    ("row", "is_open"),
    [
        ({"turns": ["Hi", "Hi"]}, True), ({"prompt": ["Hi", "Hi"]}, True), ({"turns": ["Hi"]}, False),
        ({"prompt": [HI, HELLO, HI]}, False), ({"messages": [HI, HI]}, False),
    ],
)  # fmt: skip
def test_turns_without_their_answers_are_known(row: Any, is_open: bool) -> None:
    assert conversation(row).is_open == is_open


def contents(rows: list[Any], patience: int | None = None) -> list[str]:
    numbered = (Row(value, "line", 2 * i + 1, i) for i, value in enumerate(rows))
    return list(used_rows(numbered, "f.jsonl", lambda _, asked: asked.messages[-1]["content"], patience))


def test_rows_left_out_are_counted_by_reason_with_the_first_lines(capsys: pytest.CaptureFixture[str]) -> None:
    tool = {"messages": [HI, {"role": "tool", "content": "sunny"}]}
    assert contents([{"prompt": "a"}, {}, *[tool] * 10, {"prompt": "b"}]) == ["a", "b"]
    assert capsys.readouterr().out.splitlines() == [
        "f.jsonl: 1 row left out: nothing is asked in any field that is known (line 3)",
        "f.jsonl: 10 rows left out: turns of a tool (lines 5, 7, 9, 11, 13, 15, 17, 19 and 2 more)",
    ]


def test_fields_that_are_not_read_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = HI | {"name": "Tom", "weight": None}
    contents([
        {"id": 1, "messages": [HELLO, message], "source": "web", "output": ""},
        {"unique_id": 2, "messages": [message], "source": "web", "\ud83d": 0},
        {"instruction": "Hi", "prompt": "### Hi", "output": "Hello"},
        {"seen": "only where a row is used"},
    ])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1:] == [
        "f.jsonl: not read: source, messages.name, answers that a conversation begins with, "
        "'\\ud83d', prompt, output"
    ]


def test_a_source_of_none_is_given_up_and_what_it_held_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidData, match=r"first 3 rows of f\.jsonl cannot be used; expected \{"):
        contents([{}] * 4, patience=3)
    assert "f.jsonl: 3 rows left out: " in capsys.readouterr().out
    assert contents([{}, {}, {"prompt": "Hi"}, {}], patience=3) == ["Hi"]
