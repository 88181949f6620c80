"""Tools: what a target is told, which form its calls have, and what is read from its text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from deployments.errors import RequestError
from deployments.tools import (
    HERMES,
    LLAMA,
    CallDelta,
    CallForm,
    CallReader,
    Said,
    Tools,
    form_of,
    tools_of,
    with_ids_for,
    without_tools,
)
from taps.engine.grammars import Grammars
from taps.verdict import InvalidGrammar

Json = dict[str, Any]
WEATHER: Json = {
    "name": "weather",
    "description": "What the weather is",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def keeps_to(grammars: Grammars, tokenizer: Any, grammar: str, text: str, first: Sequence[int] = ()) -> bool:
    """Whether the text may be, whole. Args: first: tokens before it."""
    ids = [*first, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    try:
        grammars.open(grammar, [*ids, tokenizer.eos_token_id])
    except InvalidGrammar:
        return False
    return True


@pytest.mark.parametrize(
    ("mode", "parallel", "text", "is_kept"),
    [
        ("auto", True, "It is sunny.", True),
        ("auto", True, CALL, True),
        ("auto", True, f"Let me see.\n{CALL}\n{OTHER}", True),
        ("auto", True, CALL.replace("weather", "wether"), False),
        ("auto", True, CALL.replace('"Oslo"', "5"), False),
        ("auto", False, CALL, True),
        ("auto", False, f"Let me see.\n{CALL}", True),
        ("auto", False, f"{CALL}\n{OTHER}", False),
        ("required", True, CALL, True),
        ("required", True, f"{CALL}\n{OTHER}", True),
        ("required", False, f"{CALL}\n{OTHER}", False),
        ("required", True, "It is sunny.", False),
        ("required", True, f"Well, {CALL}", False),
        ("named", True, CALL, True),
        ("named", True, f"{CALL}\n{OTHER}", False),
    ],
)
def test_answers_have_the_form_that_was_chosen(
    grammars: Grammars, tokenizer: Any, mode: Any, parallel: bool, text: str, is_kept: bool
) -> None:
    assert keeps_to(grammars, tokenizer, Tools((WEATHER, CLOCK), mode, parallel).grammar(), text) == is_kept


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        (None, "auto", ["weather", "clock"]),
        ("auto", "auto", ["weather", "clock"]),
        ("required", "required", ["weather", "clock"]),
        ({"type": "function", "function": {"name": "clock"}}, "named", ["clock"]),
    ],
)
def test_a_choice_says_what_may_be_called(choice: Any, mode: str, names: list[str]) -> None:
    tools = tools_of(TOOLS, choice, False)
    assert tools is not None
    assert (tools.mode, tools.parallel) == (mode, False)
    assert [function["name"] for function in tools.functions] == names


def test_without_tools_nothing_may_be_called() -> None:
    assert tools_of(TOOLS, "none", True) is None
    assert tools_of([], None, True) is None
    assert tools_of([], "auto", True) is None


@pytest.mark.parametrize(
    ("tools", "choice", "where", "reason"),
    [
        ([], "required", "tool_choice", "no tools"),
        (
            TOOLS,
            {"type": "function", "function": {"name": "nothing"}},
            "tool_choice",
            "there are: weather, clock",
        ),
        (TOOLS, "sometimes", "tool_choice", "'sometimes'"),
        ([TOOLS[0], TOOLS[0]], None, "tools", "same name"),
    ],
)
def test_what_cannot_be_called_is_said(tools: Any, choice: Any, where: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        tools_of(tools, choice, True)
    assert caught.value.param == where


def test_a_schema_of_arguments_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match="tools cannot be used"):
        Tools(({"name": "f", "parameters": {"type": "nonsense"}},)).grammar()


def read(*pieces: str, form: CallForm = HERMES) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls of a text that came in these pieces."""
    reader, content, calls = CallReader(form), "", list[tuple[str, str]]()
    for number, piece in enumerate(pieces, 1):
        said = reader.push(piece, number == len(pieces))
        content += said.content
        for call in said.calls:
            if call.name is not None:
                calls.append((call.name, ""))
            name, arguments = calls[call.call]
            calls[call.call] = name, arguments + call.arguments
    assert reader.num_calls == len(calls)
    return content, calls


HARD = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\n</tool", "b": {"c": {}}, "d": "</"}}\n</tool_call>'
TAGGED = '{"a": "</tool_call> \\\\", "b": "}\\"]<tool_call>"}'
TAGS = f'<tool_call>\n{{"name": "f", "arguments": {TAGGED}}}\n</tool_call>'
TEXTS: list[tuple[str, tuple[str, list[tuple[str, str]]]]] = [
    ("It is < 5 <tool> and <tool_cal", ("It is < 5 <tool> and <tool_cal", [])),
    (CALL, ("", [("weather", '{"city": "Oslo"}')])),
    (f"Let me see.\n{CALL}\n{OTHER}", ("Let me see.\n", [("weather", '{"city": "Oslo"}'), ("clock", "{}")])),
    (HARD, ("", [("f", '{"a": "}\\n</tool", "b": {"c": {}}, "d": "</"}')])),
    (f"{OTHER}\n", ("", [("clock", "{}")])),
    (f"{OTHER}\n  That was  it.\n", ("That was  it.\n", [("clock", "{}")])),
    (TAGS, ("", [("f", TAGGED)])),
]


LLAMAS_CALL = '{"name": "weather", "parameters": {"city": "Oslo {"}}'
LLAMAS_TEXTS: list[tuple[str, tuple[str, list[tuple[str, str]]]]] = [
    (LLAMAS_CALL, ("", [("weather", '{"city": "Oslo {"}')])),
    (f"\n{LLAMAS_CALL}\n", ("", [("weather", '{"city": "Oslo {"}')])),
    ("It is sunny.", ("It is sunny.", [])),
    (f"So: {LLAMAS_CALL}", (f"So: {LLAMAS_CALL}", [])),
    ('{"na', ('{"na', [])),
    ('{"sky": "sunny"}', ('{"sky": "sunny"}', [])),
    (" ", (" ", [])),
]


MISTRAL = CallForm("arguments", False, 1)  # the token that the embedded target begins a message with
MISTRALS_CALL, MISTRALS_OTHER = (
    json.dumps({"name": "weather", "arguments": {"city": "Oslo ]}"}}),
    '{"name": "clock", "arguments": {}}',
)
CALL_OF_CITY = '{"name": "weather", "arguments": {"city": "Oslo"}}'
MISTRALS_TEXTS: list[tuple[str, tuple[str, list[tuple[str, str]]]]] = [
    (f"[{MISTRALS_CALL}]", ("", [("weather", '{"city": "Oslo ]}"}')])),
    (
        f" [{MISTRALS_OTHER}, {MISTRALS_CALL}, {MISTRALS_OTHER}]\n",
        ("", [("clock", "{}"), ("weather", '{"city": "Oslo ]}"}'), ("clock", "{}")]),
    ),
    (f"[{MISTRALS_OTHER},{MISTRALS_OTHER}", ("", [("clock", "{}"), ("clock", "{}")])),
    ("It is sunny.", ("It is sunny.", [])),
    (f"So: [{MISTRALS_CALL}]", (f"So: [{MISTRALS_CALL}]", [])),
    (MISTRALS_CALL, (MISTRALS_CALL, [])),
    ('[{"na', ('[{"na', [])),
]


@pytest.mark.parametrize(
    ("text", "expected", "form"),
    [
        *((*one, HERMES) for one in TEXTS),
        *((*one, LLAMA) for one in LLAMAS_TEXTS),
        *((*one, MISTRAL) for one in MISTRALS_TEXTS),
    ],
)
def test_calls_are_read_however_the_text_comes(
    text: str, expected: tuple[str, list[tuple[str, str]]], form: CallForm
) -> None:
    assert read(text, form=form) == expected
    assert read(*text, form=form) == expected
    assert read(*text, "", form=form) == expected
    draw = random.Random(1)
    for _ in range(50):
        cuts = sorted(draw.choices(range(len(text)), k=5))
        pieces = (text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
        assert read(*pieces, form=form) == expected


@pytest.mark.parametrize(
    ("mode", "text", "is_kept"),
    [
        ("auto", "It is sunny.", True),
        ("auto", '{"name": "weather", "parameters": {"city": "Oslo"}}', True),
        ("auto", '{"name": "weather", "parameters": {"city": 5}}', False),
        ("required", '{"name": "clock", "parameters": {}}', True),
        ("required", "It is sunny.", False),
    ],
)
def test_llamas_calls_are_all_of_an_answer(
    mode: Any, text: str, is_kept: bool, grammars: Grammars, tokenizer: Any
) -> None:
    assert keeps_to(grammars, tokenizer, Tools((WEATHER, CLOCK), mode, form=LLAMA).grammar(), text) == is_kept


@pytest.mark.parametrize(
    ("mode", "parallel", "first", "text", "is_kept"),
    [
        ("auto", True, [], "It is sunny.", True),
        ("auto", True, [1], f"[{CALL_OF_CITY}]", True),
        ("auto", True, [1], f" [{CALL_OF_CITY}, {MISTRALS_OTHER}]", True),
        ("auto", True, [1], f"[{CALL_OF_CITY.replace('weather', 'wether')}]", False),
        ("auto", True, [], f"[{CALL_OF_CITY}]", False),
        ("auto", False, [1], f"[{CALL_OF_CITY}, {MISTRALS_OTHER}]", False),
        ("required", True, [1], f"[{CALL_OF_CITY}]", True),
        ("required", True, [], "It is sunny.", False),
        ("named", True, [1], f"[{CALL_OF_CITY}, {CALL_OF_CITY}]", False),
    ],
)
def test_mistrals_calls_are_a_list_behind_a_token(
    mode: Any, parallel: bool, first: list[int], text: str, is_kept: bool, grammars: Grammars, tokenizer: Any
) -> None:
    grammar = Tools((WEATHER, CLOCK), mode, parallel, MISTRAL).grammar()
    assert keeps_to(grammars, tokenizer, grammar, text, first) == is_kept


def test_mistrals_ids_of_calls_are_as_long_as_its_template_wants_them() -> None:
    call = {"id": "call-0123456789abcdef", "type": "function", "function": {"name": "clock", "arguments": {}}}
    messages: list[Json] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "call-0123456789abcdef"},
        {"role": "tool", "content": "noon", "tool_call_id": "a_1"},
        {"role": "tool", "content": "noon"},
    ]
    found = with_ids_for(MISTRAL, messages)
    assert found[0] == messages[0]
    assert found[1]["tool_calls"][0] == {**call, "id": "789abcdef"}
    assert [message["tool_call_id"] for message in found[2:]] == ["789abcdef", "0000000a1", "000000000"]
    assert messages[1]["tool_calls"][0] is call, "they are as they were"
    assert with_ids_for(HERMES, messages) is messages


def test_a_template_says_which_form_calls_have() -> None:
    llamas = (
        """{{ '<|python_tag|>' }} ... respond with {"name": ..., "parameters": ...} {{- '"parameters": ' }}"""
    )
    assert form_of(llamas) is LLAMA
    assert form_of("<tool_call> {{ tools }}") is HERMES
    assert form_of("None") is HERMES
    assert form_of("[TOOL_CALLS] [{{ tools }}]", {"[TOOL_CALLS]": 5}.get) == CallForm("arguments", False, 5)
    assert form_of("[TOOL_CALLS] [{{ tools }}]", {"other": 5}.get) is HERMES
    assert form_of("[TOOL_CALLS]{{ name }}[ARGS]", {"[TOOL_CALLS]": 5}.get) is HERMES


def test_arguments_come_as_they_are_written() -> None:
    reader = CallReader()
    reader.push('<tool_call>\n{"name": "weather", "arguments": ')
    begun = reader.push('{"city": "Os')
    assert begun == Said("", [CallDelta(0, "", "weather"), CallDelta(0, '{"city": "Os', None)])
    assert reader.push('lo"}') == Said("", [CallDelta(0, 'lo"}', None)])
    assert reader.push("}\n</tool") == Said("", [])
    assert reader.push("_call>", True) == Said("", [])


def test_a_call_that_is_cut_off_is_told_as_far_as_it_came() -> None:
    assert read(CALL[:-20]) == ("", [("weather", '{"city": "')])
    assert read('<tool_call>\n{"na') == ("", [])


def test_a_template_without_tools_is_told_in_the_systems_message() -> None:
    user = {"role": "user", "content": "hi"}
    (first, second) = Tools((WEATHER, CLOCK)).told([user])
    assert (first["role"], second) == ("system", user)
    assert json.dumps(WEATHER) in first["content"]
    assert "<tool_call>" in first["content"]
    (first, _) = Tools((CLOCK,)).told([{"role": "system", "content": "Be brief."}, user])
    assert first["content"].startswith("Be brief.\n\n")


def test_without_tools_in_a_template_calls_and_what_came_of_them_are_text() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": {}}}
    messages: list[Json] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c"},
        {"role": "tool", "content": "night", "tool_call_id": "c"},
        {"role": "assistant", "content": "Both.", "tool_calls": [call]},
    ]
    assert without_tools(messages) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": f"{OTHER}\n{OTHER}"},
        {
            "role": "user",
            "content": "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nnight\n</tool_response>",
        },
        {"role": "assistant", "content": f"Both.\n{OTHER}"},
    ]
    assert messages[2]["role"] == "tool", "they are as they were"
