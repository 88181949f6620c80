"""The OpenAI format: what is taken, and what is refused and how."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.errors import RequestError
from deployments.openai import Json
from deployments.schema import ChatRequest, TapsOptions, parse_chat, parse_completion
from taps.composing import STRATEGIES

CHAT: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: Json = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps(CHAT | fields).encode())


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


def test_null_means_unset() -> None:
    fields = [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
        "tools",
    ]
    assert chat(**dict.fromkeys(fields)).temperature is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 5),
        ("logit_bias", {"5": -100}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("temprature", 0.0),
        ("stop_strings", ["x"]),
        ("prompt", "hi"),
    ],
)
def test_a_parameter_that_would_change_the_answer_is_refused_by_name(name: str, value: object) -> None:
    error = refusal(**{name: value})
    assert (error.status, error.body()["error"]["type"]) == (400, "invalid_request_error")
    assert repr(name) in error.message
    assert "leave it out" in error.message


@pytest.mark.parametrize(
    ("name", "value"), [("best_of", 3), ("echo", True), ("suffix", "end"), ("logprobs", 0)]
)
def test_a_completion_parameter_that_would_change_the_answer_is_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        parse_completion(json.dumps(COMPLETION | {name: value}).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1),
        ("best_of", 1),
        ("echo", False),
        ("suffix", ""),
        ("logprobs", False),
        ("top_logprobs", None),
        ("logit_bias", {}),
        ("response_format", {"type": "text"}),
        ("tools", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("functions", []),
        ("function_call", "none"),
        ("modalities", ["text"]),
        ("audio", None),
        ("reasoning_effort", None),
        ("verbosity", None),
        ("web_search_options", None),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("service_tier", "auto"),
        ("safety_identifier", "x"),
        ("prompt_cache_key", "x"),
        ("prediction", {"type": "content"}),
        ("parallel_tool_calls", True),
    ],
)
def test_a_parameter_that_changes_nothing_is_taken(name: str, value: object) -> None:
    assert chat(**{name: value}).model == "m"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 1e-40),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("presence_penalty", 2.1),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", -2.1),
        ("seed", 1.5),
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
        ("temperature", 2),
        ("top_p", 1),
        ("top_k", -1),
        ("seed", -5),
        ("stop", ["x"] * 16),
    ],
)
def test_the_edges_of_the_ranges_are_taken(name: str, value: object) -> None:
    assert getattr(chat(**{name: value}), name) == value


@pytest.mark.parametrize(("stop", "strings"), [("x", ("x",)), (["x", "y"], ("x", "y")), ([], ())])
def test_stop_is_one_string_or_several(stop: object, strings: tuple[str, ...]) -> None:
    assert chat(stop=stop).stop_strings == strings


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"hello", b"[" * 100_000])
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="not JSON") as caught:
        parse_chat(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b'"hi"', b"{}"])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(body)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "c"}]},
        {"role": "user", "content": "x", "name": "Ann"},
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


def test_messages_are_made_plain_for_the_chat_template() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert [message.plain() for message in request.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
    ]


@pytest.mark.parametrize(
    ("prompt", "taken"), [("hi", "hi"), (["hi"], "hi"), ([1, 2], [1, 2])], ids=["text", "list", "ids"]
)
def test_a_completion_takes_one_prompt(prompt: object, taken: object) -> None:
    assert parse_completion(json.dumps(COMPLETION | {"prompt": prompt}).encode()).prompt == taken


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", "b"], [[1, 2], [3]], [1.5], [True], None])
def test_a_completion_refuses_no_prompt_and_several(prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion(json.dumps(COMPLETION | {"prompt": prompt}).encode())
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
    ],
)
def test_a_bad_speculation_option_is_refused_and_named(options: Json, param: str) -> None:
    assert refusal(taps=options).param == param


def test_an_unknown_strategy_is_answered_with_those_there_are() -> None:
    assert "merged" in refusal(taps={"strategy": "best"}).message


def test_usage_is_sent_with_the_stream_only_when_asked_for() -> None:
    assert chat(stream_options={"include_usage": True}).include_usage
    assert not chat(stream_options={}).include_usage
