"""What a benchmark reads off a stream: when text came, how much it was, and whether it was all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.bench.streams import Answer, Reading, refusal_text
from tests.answered import answer


def event(payload: Any) -> bytes:
    return f"data: {json.dumps(payload)}\n\n".encode()


def chunk(text: str, **delta: Any) -> bytes:
    return event({"choices": [{"delta": {"content": text, **delta}, "finish_reason": None}], "usage": None})


LAST = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
USAGE = event(
    {
        "choices": [],
        "usage": {"completion_tokens": 7, "prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}},
        "metrics": {"speculative_decoding": {"num_spec_steps": 3}},
    }
)
DONE = b"data: [DONE]\n\n"
STREAM = chunk("", role="assistant") + chunk("Hé") + b": a comment\n\n" + chunk("llo") + LAST + USAGE + DONE


def read(*parts: bytes) -> Answer:
    """Each part a second after the one before it."""
    reading = Reading()
    for now, part in enumerate(parts, 1):
        reading.feed(part, float(now))
    return reading.answer("q", 0.0, len(parts) + 1.0, 0)


def test_what_is_read_does_not_depend_on_where_the_bytes_are_cut() -> None:
    whole = read(STREAM)
    for size in (1, 2, 7, 50):
        parts = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]
        cut = read(*parts)
        assert (cut.text, cut.tokens, cut.metrics, cut.error) == (whole.text, 7, whole.metrics, None)
        assert len(cut.arrivals) == 2
    assert (whole.text, whole.prompt_tokens, whole.cached_tokens) == ("Héllo", 5, 4)
    assert whole.metrics == {"speculative_decoding": {"num_spec_steps": 3}}


def test_carriage_returns_and_no_space_after_the_colon_are_read_too() -> None:
    assert read(STREAM.replace(b"\n", b"\r\n").replace(b"data: ", b"data:")).text == "Héllo"


def test_the_first_token_is_the_first_text_and_gaps_lie_between_texts() -> None:
    found = read(chunk("", role="assistant"), chunk("a"), chunk(""), chunk("b"), chunk("c"), LAST, USAGE + DONE)
    assert found.first_token_s == 2.0
    assert found.gaps_s == [2.0, 1.0]
    assert found.per_token_s == pytest.approx(3 / 6)


def test_reasoning_is_text() -> None:
    thought = event({"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]})
    assert read(thought + LAST + DONE).text == "hm"


def test_without_usage_a_chunk_is_a_token_and_that_is_noted() -> None:
    found = read(chunk("a") + chunk("b") + LAST + DONE)
    assert (found.tokens, found.tokens_are_chunks, found.error) == (2, True, None)
    assert not read(STREAM).tokens_are_chunks


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (chunk("a"), "ended before the answer did"),
        (b"", "ended before the answer did"),
        (chunk("a") + event({"error": {"message": "no verifier is up"}}) + DONE, "^no verifier is up$"),
        (event({"error": "odd"}), "^odd$"),
        (b"data: {half\n\n" + LAST, "not in the OpenAI format"),
        (event(["not", "an", "object"]) + LAST, "not in the OpenAI format"),
        (event({"choices": [7]}) + LAST, "not in the OpenAI format"),
    ],
)
def test_an_answer_that_is_not_whole_says_why(stream: bytes, error: str) -> None:
    found = read(stream)
    assert found.error is not None
    with pytest.raises(ValueError, match=error):
        raise ValueError(found.error)


def test_an_answer_without_text_has_no_first_token_and_one_token_has_no_time_per_token() -> None:
    nothing = answer(tokens=3, arrivals=())
    assert (nothing.first_token_s, nothing.per_token_s, nothing.gaps_s) == (None, None, [])
    assert answer(tokens=1).per_token_s is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "too\\nfull"}}', "too full"),
        (b'{"detail": "x"}', '{"detail": "x"}'),
        (b"<html>\n502</html>", "<html> 502</html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"x" * 999, "x" * 200),
    ],
)
def test_a_refusal_is_told_in_one_line(body: bytes, text: str) -> None:
    assert refusal_text(body) == text
