"""The OpenAI format: what is taken, and what is refused and how."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.errors import RequestError
from deployments.openai import Json
from deployments.schema import ChatRequest, CompletionRequest, TapsOptions, parse_chat, parse_completion
from taps.composing import STRATEGIES

CHAT: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: Json = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps(CHAT | fields).encode(), "m")


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps(COMPLETION | fields).encode(), "m")


def refusal(**fields: Any) -> RequestError:
    """The error of a chat request with these fields."""
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return caught.value


def test_a_silent_request_leaves_everything_to_the_server() -> None:
    request = chat()
    unset = (
        "max_tokens max_completion_tokens temperature top_p top_k seed stop presence_penalty frequency_penalty"
    )
    assert [getattr(request, name) for name in unset.split()] == [None] * 9
    assert not request.stream
    assert request.stop_strings == ()
    assert not request.include_usage
    assert request.options == TapsOptions()


def test_null_says_nothing_under_any_name() -> None:
    names = [
        "max_tokens",
        "temperature",
        "stop",
        "stream",
        "stream_options",
        "taps",
        "n",
        "guided_json",
        "anything",
    ]
    message = {"role": "user", "content": "hi", "name": None, "tool_calls": None, "anything": None}
    inside = {
        "stream_options": {"anything": None},
        "taps": {"strategy": None, "anything": None},
        "response_format": {"type": "text", "json_schema": None},
        "chat_template_kwargs": {"enable_thinking": None},
    }
    assert chat(**dict.fromkeys(names)).temperature is None
    assert chat(messages=[message], **inside).options == TapsOptions()
    assert completion(**dict.fromkeys(names)).max_tokens is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 64.5),
        ("max_tokens", "64"),
        ("max_tokens", True),
        ("max_tokens", float("inf")),
        ("max_completion_tokens", 0),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("seed", 1.5),
        ("seed", "1"),
        ("seed", False),
        ("stop", 5),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop", [5]),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hi"),
        ("model", None),
    ],
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused_and_the_parameter_named(
    name: str, value: object
) -> None:
    error = refusal(**{name: value})
    assert error.param == name or str(error.param).startswith(f"{name}.0")
    assert error.message.startswith(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-3),
        ("temperature", 1e-40),
        ("temperature", 2),
        ("top_p", 0),
        ("top_p", 1),
        ("top_k", -1),
        ("seed", -5),
        ("seed", 10**30),
        ("stop", ["x"] * 16),
    ],
)
def test_the_edges_of_the_ranges_are_taken(name: str, value: object) -> None:
    assert getattr(chat(**{name: value}), name) == value


def test_whole_numbers_may_be_written_as_floats() -> None:
    request = chat(max_tokens=64.0, max_completion_tokens=32.0, seed=-5.0, top_k=7.0, n=1.0)
    numbers = request.max_tokens, request.max_completion_tokens, request.seed, request.top_k
    assert numbers == (64, 32, -5, 7)
    assert [type(number) for number in numbers] == [int] * 4
    options = chat(taps={"num_nodes": 4.0, "depth": 2.0}).options
    assert (options.num_nodes, options.depth) == (4, 2)
    assert completion(prompt=[1.0, 2]).prompt == [[1, 2]]


@pytest.mark.parametrize(
    ("stop", "strings"),
    [
        ("x", ("x",)),
        (["x", "y"], ("x", "y")),
        (["x", "", "y", "x"], ("x", "y")),
        ([], ()),
        ("", ()),
        ([""], ()),
        (None, ()),
    ],
)
def test_stop_is_one_string_or_several_and_empty_ones_stop_nothing(
    stop: object, strings: tuple[str, ...]
) -> None:
    assert chat(stop=stop).stop_strings == strings


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"hello", b"[" * 100_000])
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="not JSON") as caught:
        parse_chat(body, "m")
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"\xed\xa0\xbd", rb'{"model": "m", "prompt": "caf\u00e9"}' + b"\xe9"])
def test_a_body_that_is_not_utf8_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="not JSON"):
        parse_completion(body, "m")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "cut \ud83d"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]},
        {"stop": "\ud83d"},
        {"model": "\ud83d"},
        {"user": "\ud83d"},
        {"\ud83d": 1},
        {"taps": {"\ud83d": 1}},
    ],
)
def test_half_of_a_character_is_refused_wherever_it_stands(fields: Json) -> None:
    error = refusal(**fields)
    assert "half of a character" in error.message
    assert json.dumps(error.body(), ensure_ascii=False).encode()


def test_escaped_characters_and_backslashes_are_taken() -> None:
    text = "\N{GRINNING FACE} \\ud83d \0 \N{LATIN SMALL LETTER E WITH ACUTE}"
    assert completion(prompt=text).prompt == [text]


@pytest.mark.parametrize("depth", range(100, 1200, 25))
def test_a_value_that_is_nested_deeply_is_refused_however_deeply(depth: int) -> None:
    """Python stops at a depth that depends on who calls: in the JSON, in a comparison, in an error message."""
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    for name in (b"x", b"logit_bias"):
        body = b'{"model": "m", "prompt": "hi", "' + name + b'": ' + nested + b"}"
        with pytest.raises(RequestError) as caught:
            parse_completion(body, "m")
        assert caught.value.status == 400


def test_what_is_wrong_many_times_is_said_once() -> None:
    """A list of errors takes far more memory than the body that has them."""
    for fields in ({"prompt": [1, *["a"] * 1000]}, {"stop": ["a", *[5] * 1000]}):
        with pytest.raises(RequestError) as caught:
            completion(**fields)
        assert isinstance(caught.value.__cause__, ValidationError)
        assert caught.value.__cause__.error_count() < 5


@pytest.mark.parametrize("body", [b"[]", b"null", b'"hi"', b"{}"])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(body, "m")
    assert caught.value.status == 400


def call(arguments: object) -> Json:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "tool_call_id": "c"},
        {"role": "user", "content": "x", "tool_calls": [call("{}")]},
        {"role": "assistant", "tool_calls": [call("[]")]},
        {"role": "assistant", "tool_calls": [call("{")]},
        {"role": "function", "content": "x", "name": "f"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]},
        {"role": "system", "content": None},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "user", "content": "x", "name": 5},
    ],
)
def test_a_message_that_cannot_be_shown_to_the_target_is_refused(message: Json) -> None:
    assert str(refusal(messages=[message]).param).startswith("messages.0")


def test_of_several_forms_the_one_that_came_closest_is_named() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    error = refusal(messages=[{"role": "user", "content": parts}])
    assert error.param == "messages.0.content.0.type"
    assert "Input should be 'text'" in error.message
    assert refusal(stop=["a", 5]).param == "stop.1"


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ({"role": "developer", "content": "be brief"}, {"role": "system", "content": "be brief"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "a\nb"},
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            },
            {"role": "user", "content": "a"},
        ),
        (
            {"role": "user", "name": "Ann", "content": "a", "cache_control": {"type": "ephemeral"}},
            {"role": "user", "name": "Ann", "content": "a"},
        ),
        ({"role": "user", "name": "", "content": ""}, {"role": "user", "content": ""}),
        (
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
            {"role": "assistant", "content": ""},
        ),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "tool_calls": [call('{"a": 1}')]},
            {"role": "assistant", "content": "", "tool_calls": [call({"a": 1})]},
        ),
        (
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ),
        (
            {"role": "assistant", "content": [], "prefix": False, "reasoning": ""},
            {"role": "assistant", "content": ""},
        ),
    ],
)
def test_messages_are_made_plain_for_the_chat_template(message: Json, plain: Json) -> None:
    (taken,) = chat(messages=[message]).messages
    assert taken.plain() == plain


def test_another_model_is_said_before_anything_else_that_is_wrong() -> None:
    error = refusal(model="other", messages=[], temperature="hot", tools=[{}])
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert "'other'" in error.message
    assert "'m'" in error.message


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        ([1, 2], [[1, 2]]),
        ([[1.0, 2]], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_completion_takes_prompts(prompt: object, taken: object) -> None:
    assert completion(prompt=prompt).prompt == taken


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""], [[1], []], ["a"] * 65, [1.5], [True], 5, None])
def test_a_completion_refuses_what_is_no_prompt(prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert str(caught.value.param).startswith("prompt")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_asked_for(strategy: str) -> None:
    options = chat(taps={"strategy": strategy, "drafters": ["math"], "num_nodes": 4, "depth": 2}).options
    assert (options.strategy, options.drafters, options.num_nodes, options.depth) == (strategy, ["math"], 4, 2)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"strategy": "best"}, "taps.strategy"),
        ({"num_nodes": 0}, "taps.num_nodes"),
        ({"num_nodes": 257}, "taps.num_nodes"),
        ({"depth": 0}, "taps.depth"),
        ({"drafters": "math"}, "taps.drafters"),
        ({"temperature": 0}, "taps.temperature"),
        ({"numNodes": 4}, "taps.numNodes"),
        ({"num_nodes": 4.5}, "taps.num_nodes"),
        ({"depth": True}, "taps.depth"),
    ],
)
def test_a_bad_speculation_option_is_refused_and_named(options: Json, param: str) -> None:
    assert refusal(taps=options).param == param


def test_an_unknown_strategy_is_answered_with_those_there_are() -> None:
    assert "merged" in refusal(taps={"strategy": "best"}).message


def test_usage_is_sent_with_the_stream_only_when_asked_for() -> None:
    assert chat(stream_options={"include_usage": True}).include_usage
    assert not chat(stream_options={}).include_usage
