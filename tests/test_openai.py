"""Answers in the OpenAI format: what clients read."""

from __future__ import annotations

import json
import random

import pytest

from deployments import openai
from deployments.errors import RequestError
from deployments.openai import Json, Kind, Writer
from deployments.record import RequestRecord
from deployments.requests import Generation
from taps.decoding.policy import Step
from taps.drafting.drafter import Ask
from taps.session import SessionState
from taps.shaping import SamplingParams
from tests.fakes import make_verdict


def payload(event: bytes) -> Json:
    """The JSON of a server-sent event, which is one line whatever a client takes for the end of one."""
    line, *rest = event.decode().splitlines()
    assert rest == [""]
    assert line.startswith("data: ")
    parsed: Json = json.loads(line.removeprefix("data: "))
    return parsed


def record_of(prompt_tokens: int, new_tokens: int, drafters: tuple[str, ...] = ()) -> RequestRecord:
    """A record that so many tokens were delivered to."""
    state = SessionState((7,) * prompt_tokens, 0, SamplingParams(), 100)
    job = Generation(state, (), "merged", drafters, Ask())
    record = RequestRecord("id", job)
    record.take(Step(make_verdict([1] * new_tokens), True, 0.0, 1.0), new_tokens)
    return record


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (503, "server_error")])
def test_an_error_body_has_openais_fields(status: int, kind: str) -> None:
    error = RequestError("no", param="model", status=status, code="c")
    assert error.body() == {"error": {"message": "no", "type": kind, "param": "model", "code": "c"}}
    assert payload(openai.error_event(error)) == error.body()


def test_a_whole_chat_answer() -> None:
    writer = Writer("chat", "m")
    body = writer.whole("hello", "stop", record_of(3, 5))
    assert (body["id"], body["object"], body["model"]) == (writer.id, "chat.completion", "m")
    assert writer.id.startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert body["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert body["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_a_whole_completion() -> None:
    writer = Writer("completion", "m")
    body = writer.whole("hello", "length", record_of(3, 5))
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": "hello"}]


def test_chat_chunks_begin_with_the_role_and_share_their_head() -> None:
    writer = Writer("chat", "m")
    events = writer.first_chunk(""), writer.chunk("a\nb"), writer.last_chunk("stop")
    chunks = [payload(event) for event in events]
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a\nb"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {(writer.id, "chat.completion.chunk", "m")}


def test_completion_chunks_carry_text() -> None:
    writer = Writer("completion", "m")
    events = writer.first_chunk("\N{GRINNING FACE}"), writer.chunk("b"), writer.last_chunk("length")
    chunks = [payload(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "finish_reason": None, "logprobs": None, "text": "\N{GRINNING FACE}"}],
        [{"index": 0, "finish_reason": None, "logprobs": None, "text": "b"}],
        [{"index": 0, "finish_reason": "length", "logprobs": None, "text": ""}],
    ]


ENDS_OF_LINES = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
HARD = [
    "",
    '"',
    "\\",
    "\\u0041",
    "\0\x1f\x7f",
    ENDS_OF_LINES,
    "{}%s%b",
    "\N{GRINNING FACE}",
    "\ud800",
    "\udc00\ud800",
]


def random_text(draw: random.Random) -> str:
    alphabet = [*'ab "\\/{}%<&\t', *ENDS_OF_LINES, *HARD, chr(draw.randrange(0x110000))]
    return "".join(draw.choices(alphabet, k=draw.randrange(12)))


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("model", ["m", 'a "model" of \N{GREEK SMALL LETTER PI}\u2028%b'])
def test_a_chunk_is_the_same_object_whatever_its_text(kind: Kind, include_usage: bool, model: str) -> None:
    """What chunks share is encoded once; it is as if each had been encoded whole."""
    writer = Writer(kind, model, include_usage)
    draw = random.Random(1)
    for text in HARD + [random_text(draw) for _ in range(500)]:
        said = {"delta": {"content": text}} if kind == "chat" else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": None}
        whole = payload(writer.last_chunk("stop")) | {"choices": [choice]}
        assert payload(writer.chunk(text)) == json.loads(json.dumps(whole))


def test_text_goes_as_utf_8_and_without_spaces() -> None:
    chunk = Writer("chat", "m").chunk("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n")
    assert b'"delta":{"content":"gr\xc3\xbcn"}' in chunk


def test_the_usage_chunk_has_no_choices() -> None:
    chunk = payload(Writer("chat", "m").usage_chunk(record_of(1, 2)))
    assert chunk["choices"] == []
    assert chunk["usage"]["total_tokens"] == 3
    assert chunk["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_a_stream_with_usage_has_a_null_on_every_other_chunk() -> None:
    writer = Writer("chat", "m", include_usage=True)
    assert payload(writer.chunk("a"))["usage"] is None
    assert payload(writer.usage_chunk(record_of(1, 2)))["usage"]["total_tokens"] == 3
    assert "usage" not in payload(Writer("chat", "m").chunk("a"))


def test_two_answers_have_two_ids() -> None:
    assert Writer("chat", "m").id != Writer("chat", "m").id


def test_speculation_metrics_name_the_drafters() -> None:
    record = record_of(1, 0, ("math", "chat", "code"))
    verdict = make_verdict([1, 2, 3], owners=[0b10, 0b11], num_nodes=8, depth=3)
    record.take(Step(verdict, False, 1.0, 2.0), 3)
    assert openai.speculation(record)["speculative_decoding"] == {
        "acceptance_histogram": [0, 0, 1, 0],
        "num_spec_steps": 1,
        "num_plain_steps": 0,
        "num_spec_tokens": 3,
        "num_draft_tokens": 8,
        "num_accepted_draft_tokens": 2,
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.25,
        "accepted_by_drafter": {"math": 1, "chat": 2, "code": 0},
    }


def test_the_model_list_has_the_one_model() -> None:
    listed = openai.model_list([openai.model_card("m", 5, 2048)])
    assert listed["object"] == "list"
    assert [(card["id"], card["object"], card["max_model_len"]) for card in listed["data"]] == [
        ("m", "model", 2048)
    ]
