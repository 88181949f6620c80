"""Answers in the OpenAI format: what clients read."""

from __future__ import annotations

import json
import random

import pytest

from deployments import openai
from deployments.errors import RequestError
from deployments.openai import Json, Kind, Piece, Writer
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


def events(writer: Writer, *pieces: Piece) -> list[Json]:
    """The JSON of what a stream of these pieces has."""
    return [payload(event) for piece in pieces for event in writer.chunks(piece)]


def record_of(prompt_tokens: int, new_tokens: int, drafters: tuple[str, ...] = ()) -> RequestRecord:
    """A record that so many tokens were delivered to."""
    state = SessionState((7,) * prompt_tokens, 0, SamplingParams(), 100)
    job = Generation(state, (), "merged", drafters, Ask())
    record = RequestRecord("id", [job])
    record.take(Step(make_verdict([1] * new_tokens), True, 0.0, 1.0), new_tokens)
    return record


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (503, "server_error")])
def test_an_error_body_has_openais_fields(status: int, kind: str) -> None:
    error = RequestError("no", param="model", status=status, code="c")
    assert error.body() == {"error": {"message": "no", "type": kind, "param": "model", "code": "c"}}
    assert payload(openai.error_event(error)) == error.body()


def test_a_whole_chat_answer() -> None:
    writer = Writer("chat", "m")
    body = writer.whole([Piece("hel"), Piece("lo", "stop")], record_of(3, 5))
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
    body = writer.whole([Piece("hello", "length")], record_of(3, 5))
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "text": "hello"}]


def test_chat_chunks_begin_with_the_role_and_share_their_head() -> None:
    writer = Writer("chat", "m")
    chunks = events(writer, Piece(""), Piece("a\nb", "stop"))
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a\nb"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {(writer.id, "chat.completion.chunk", "m")}


def test_completion_chunks_carry_text() -> None:
    writer = Writer("completion", "m")
    chunks = events(writer, Piece("\N{GRINNING FACE}"), Piece("b"), Piece("", "length"))
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
    _, last = events(writer, Piece("", "stop"))
    draw = random.Random(1)
    for text in HARD + [random_text(draw) for _ in range(500)]:
        said = {"delta": {"content": text}} if kind == "chat" else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": None}
        chunks = events(writer, Piece(text))
        assert chunks == [json.loads(json.dumps(last | {"choices": [choice]}))] * bool(text)


def test_text_goes_as_utf_8_and_without_spaces() -> None:
    (chunk,) = Writer("chat", "m").chunks(Piece("gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n"))
    assert b'"content":"gr\xc3\xbcn"}' in chunk


def test_the_usage_chunk_has_no_choices() -> None:
    chunk = payload(Writer("chat", "m").usage_chunk(record_of(1, 2)))
    assert chunk["choices"] == []
    assert chunk["usage"]["total_tokens"] == 3
    assert chunk["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_a_stream_with_usage_has_a_null_on_every_other_chunk() -> None:
    writer = Writer("chat", "m", include_usage=True)
    assert [chunk["usage"] for chunk in events(writer, Piece("a"), Piece("b", "stop"))] == [None] * 3
    assert payload(writer.usage_chunk(record_of(1, 2)))["usage"]["total_tokens"] == 3
    assert "usage" not in events(Writer("chat", "m"), Piece("a"))[0]


def test_answers_that_come_at_once_are_told_apart() -> None:
    pieces = Piece("a", answer=1), Piece("b", answer=0), Piece("c", "stop", 1), Piece("d", "length", 0)
    chunks = [chunk["choices"][0] for chunk in events(Writer("chat", "m"), *pieces)]
    assert [(chunk["index"], chunk["delta"].get("content")) for chunk in chunks] == [
        (1, "a"), (0, "b"), (1, "c"), (1, None), (0, "d"), (0, None)
    ]  # fmt: skip
    assert [chunk["delta"].get("role") for chunk in chunks][:2] == ["assistant"] * 2
    body = Writer("completion", "m").whole(pieces, record_of(3, 4))
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [
        (0, "bd", "length"), (1, "ac", "stop")
    ]  # fmt: skip


def test_token_ids_are_where_vllm_has_them() -> None:
    pieces = Piece("a", tokens=[5], prompt=[1, 2]), Piece("", tokens=[6]), Piece("b", "stop", tokens=[7, 8])
    first, second, third, last = events(Writer("chat", "m"), *pieces)
    assert (first["prompt_token_ids"], first["choices"][0]["token_ids"]) == ([1, 2], [5])
    assert [chunk["choices"][0].get("token_ids") for chunk in (second, third, last)] == [[6], [7, 8], None]
    assert not any("prompt_token_ids" in chunk for chunk in (second, third, last))
    assert events(Writer("completion", "m"), *pieces)[0]["choices"][0]["prompt_token_ids"] == [1, 2]
    chat = Writer("chat", "m").whole(pieces, record_of(2, 4))
    assert (chat["prompt_token_ids"], chat["choices"][0]["token_ids"]) == ([1, 2], [5, 6, 7, 8])
    (choice,) = Writer("completion", "m").whole(pieces, record_of(2, 4))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2], [5, 6, 7, 8])
    assert "token_ids" not in str(Writer("chat", "m").whole([Piece("a", "stop")], record_of(2, 4)))


def test_a_step_is_told_beside_its_text() -> None:
    chunks = events(
        Writer("chat", "m"), Piece("a"), Piece("", step={"tokens": 2}), Piece("b", "stop", step={"tokens": 1})
    )
    assert [chunk.get("taps") for chunk in chunks] == [None, {"tokens": 2}, {"tokens": 1}, None]


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
