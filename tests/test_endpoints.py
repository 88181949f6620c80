"""The HTTP endpoints: what is answered, and what is freed whatever clients and replicas do."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import pytest

from deployments.openai import Json
from taps.peers import PeerBusy, PeerGone
from taps.sampling import InvalidLogits
from taps.verdict import InvalidGrammar, PromptTooLong
from tests.fakes import turns, until
from tests.serving import COMPLETION, END, PATHS, PATIENCE_S, Script, Server
from tests.test_requests import MODEL, CharacterTokenizer

every_path = pytest.mark.parametrize("path", PATHS)


def events(answer: httpx.Response) -> list[Json]:
    """The JSON of a stream's events; the last one must say that it is done."""
    *data, done = [line for line in answer.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in data]


def said(choice: Json) -> str:
    """The text of a whole answer's choice."""
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def text_of(choice: Json) -> str:
    text: str = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


@every_path
async def test_a_stream_says_what_the_whole_answer_says(path: str) -> None:
    server = Server("He", "", "llo", " you", chr(END))
    whole = (await server.post(path)).json()
    answer = await server.post(path, stream=True, stream_options={"include_usage": True})
    *chunks, last, usage = events(answer)
    said = whole["choices"][0]
    assert "".join(text_of(chunk["choices"][0]) for chunk in chunks) == "Hello you"
    assert said.get("text", said.get("message", {}).get("content")) == "Hello you"
    assert last["choices"][0]["finish_reason"] == said["finish_reason"] == "stop"
    assert usage["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 10
    assert server.ledger.outcomes == ["stop", "stop"]


@every_path
@pytest.mark.parametrize("script", [("Hello",), ("He", "llo", "!"), ("He", chr(END)), (chr(END),)])
async def test_no_chunk_has_text_and_a_finish_reason(path: str, script: tuple[str, ...]) -> None:
    answer = await Server(*script).post(path, stream=True, max_tokens=5)
    choices = [chunk["choices"][0] for chunk in events(answer)]
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    assert text_of(choices[-1]) == ""
    if "delta" in choices[0]:
        assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (
            len(choices) - 1
        )


@every_path
async def test_the_tokens_of_a_step_come_in_one_chunk_and_one_message(path: str) -> None:
    script = ("He", "llo y", "", "ou", chr(END))
    server = Server(*script)
    async with server.connection(path, json.dumps(PATHS[path] | {"stream": True}).encode()) as connection:
        assert (await connection.sent())["status"] == 200
        sent = [await connection.sent()]
        while sent[-1]["more_body"]:
            sent.append(await connection.sent())
    *chunks, last, done, end = [message["body"] for message in sent]
    texts = [text_of(json.loads(chunk.removeprefix(b"data: "))["choices"][0]) for chunk in chunks]
    assert texts == ["He", "llo y", "ou"]
    assert b'"finish_reason":"stop"' in last
    assert (done, end) == (b"data: [DONE]\n\n", b"")


async def test_a_stream_is_neither_buffered_nor_cached_on_its_way() -> None:
    answer = await Server(chr(END)).post("/v1/completions", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("failure", "status", "code", "outcome"),
    [
        (PeerBusy("full"), 503, "overloaded", "overloaded"),
        (PeerGone("lost"), 503, None, "failed"),
        (PromptTooLong("too long"), 400, "context_length_exceeded", "refused"),
        (InvalidGrammar("no"), 400, None, "refused"),
        (InvalidLogits("nan"), 500, None, "failed"),
        (RuntimeError("a bug"), 500, None, "failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_has_a_status(
    failure: Exception, status: int, code: str | None, outcome: str, stream: bool
) -> None:
    server = Server(failure)
    answer = await server.post("/v1/completions", stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert server.ledger.outcomes == [outcome]
    assert server.generator.num_open == 0


async def test_a_server_without_a_verifier_says_so() -> None:
    server = Server(PeerBusy("full"))
    server.directory.verifier_is_up = False
    assert "no verifier is up" in (await server.post("/v1/completions")).json()["error"]["message"]


@pytest.mark.parametrize("failure", [PeerGone("lost"), InvalidLogits("nan"), RuntimeError("a bug")])
async def test_a_failure_within_a_stream_is_its_last_event(failure: Exception) -> None:
    server = Server("He", failure)
    answer = await server.post("/v1/completions", stream=True)
    first, last = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert (answer.status_code, text_of(first["choices"][0])) == (200, "He")
    assert last["error"]["type"] == "server_error"
    assert server.ledger.outcomes == ["failed"]
    assert server.generator.num_open == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_takes_too_long_is_given_up(stream: bool) -> None:
    server = Server(asyncio.Event(), request_deadline_s=0.05)
    answer = await server.post("/v1/completions", stream=stream)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
    assert server.generator.num_open == 0


async def test_a_client_that_leaves_a_stream_frees_its_generation() -> None:
    server = Server("He", asyncio.Event())
    body = json.dumps(COMPLETION | {"stream": True}).encode()
    async with server.connection("/v1/completions", body) as connection:
        assert (await connection.sent())["status"] == 200
        assert b"He" in (await connection.sent())["body"]
        assert server.generator.num_open == 1
        connection.gone.set()
        await server.until_free()
    assert server.ledger.outcomes == ["cancelled"]


@pytest.mark.parametrize("script", [(asyncio.Event(),), ("He", asyncio.Event())])
async def test_a_cancelled_request_frees_its_generation(script: Script) -> None:
    """Serve cancels the request of a client that has gone."""
    server = Server(*script)
    async with server.connection("/v1/completions", json.dumps(COMPLETION).encode()) as connection:
        await until(lambda: server.generator.num_open > 0)
        connection.task.cancel()
        await server.until_free()
    assert server.ledger.outcomes == ["cancelled"]


async def test_a_finished_answer_frees_its_generation() -> None:
    server = Server("He", chr(END), asyncio.Event())
    assert (await server.post("/v1/completions")).status_code == 200
    await server.until_free()


@every_path
async def test_a_refused_request_generates_nothing_and_is_counted(path: str) -> None:
    server = Server(chr(END))
    answer = await server.post(path, mirostat=2)
    assert answer.status_code == 400
    assert server.ledger.refused == [answer.json()["error"]["message"]]
    assert not server.generator.jobs


async def test_the_status_says_what_there_is_and_how_it_fares() -> None:
    server = Server("He", chr(END))
    await server.post("/v1/completions", mirostat=2)
    told = (await server.ask("GET", "/status")).json()
    assert (told["status"], told["model"], told["drafters"]) == ("ok", MODEL, ["chat", "math"])
    assert {"numerics", "applications", "specialists"} <= told.keys()
    assert told["router"]["answering"] == 0
    server.directory.verifier_is_up = False
    assert (await server.ask("GET", "/status")).json()["status"] == "no verifier is up"


@every_path
async def test_choices_are_answered_side_by_side(path: str) -> None:
    server = Server("He", "llo", chr(END))
    whole = (await server.post(path, n=3)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert [said(choice) for choice in whole["choices"]] == ["Hello"] * 3
    assert [job.state.sampling.choice for job in server.generator.jobs] == [0, 1, 2]
    assert (whole["usage"]["completion_tokens"], whole["usage"]["prompt_tokens"]) == (18, 5)
    *chunks, usage = events(await server.post(path, n=3, stream=True, stream_options={"include_usage": True}))
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += text_of(chunk["choices"][0])
    assert texts == ["Hello"] * 3
    reasons = [(chunk["choices"][0]["index"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert sorted(pair for pair in reasons if pair[1]) == [(0, "stop"), (1, "stop"), (2, "stop")]
    assert usage["usage"] == whole["usage"]
    await server.until_free()
    assert server.ledger.outcomes == ["stop", "stop"], "one request, one outcome"


async def test_other_choices_begin_once_their_prompt_is_there() -> None:
    """They find its pages in the cache."""
    gate = asyncio.Event()
    server = Server(gate, "He", chr(END))
    task = asyncio.create_task(server.post("/v1/completions", n=4, prompt=["hello", "hi"]))
    await until(lambda: server.generator.num_open == 2)
    for _ in range(50):
        await asyncio.sleep(0)
    assert [job.state.sampling.choice for job in server.generator.jobs] == [0, 0]
    gate.set()
    choices = (await task).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(8))
    assert len(server.generator.jobs) == 8


async def test_a_failure_of_one_choice_is_the_requests() -> None:
    server = Server("He", PeerGone("lost"))
    answer = await server.post("/v1/chat/completions", n=3)
    assert answer.status_code == 503
    assert server.ledger.outcomes == ["failed"]
    await server.until_free()


async def test_a_client_that_leaves_frees_all_choices() -> None:
    server = Server("He", asyncio.Event())
    body = json.dumps(COMPLETION | {"stream": True, "n": 5}).encode()
    async with server.connection("/v1/completions", body) as connection:
        assert (await connection.sent())["status"] == 200
        await until(lambda: server.generator.num_open == 5)
        connection.gone.set()
        await server.until_free()
    assert server.ledger.outcomes == ["cancelled"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_comes_before_the_text(stream: bool) -> None:
    server = Server(" wor", "ld", chr(END))
    fields = {"prompt": ["hello", "hi"], "echo": True, "return_token_ids": True}
    answer = await server.post("/v1/completions", stream=stream, **fields)
    texts = ["", ""]
    ids: list[list[int]] = [[], []]
    prompts: list[list[int]] = [[], []]
    choices = [chunk["choices"][0] for chunk in events(answer)] if stream else answer.json()["choices"]
    for choice in choices:
        texts[choice["index"]] += choice["text"]
        ids[choice["index"]] += choice.get("token_ids", [])
        prompts[choice["index"]] += choice.get("prompt_token_ids", [])
    assert texts == ["hello world", "hi world"]
    assert ids == [[*map(ord, " world"), END]] * 2
    assert prompts == [[*map(ord, "hello")], [*map(ord, "hi")]]


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALLS = (
    "Let me see. <tool",
    '_call>\n{"name": "clock", "arg',
    'uments": {"zone": "CET"}}',
    "\n</tool_call>",
    chr(END),
)


async def test_calls_of_tools_are_told_as_openai_tells_them() -> None:
    whole = (await Server(*CALLS).post("/v1/chat/completions", tools=TOOLS)).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me see. "
    (call,) = whole["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "clock", "arguments": '{"zone": "CET"}'})
    assert call["id"].startswith("call")
    chunks = events(await Server(*CALLS).post("/v1/chat/completions", tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see. "
    told = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call.get("id", "call")[:4] for call in told] == ["call"] * len(told)
    assert told[0]["function"]["name"] == "clock"
    assert "".join(call["function"]["arguments"] for call in told) == '{"zone": "CET"}'
    assert {call["index"] for call in told} == {0}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_where_nothing_is_called_an_answer_with_tools_is_as_any_other() -> None:
    server = Server("He", "llo", chr(END))
    whole = (await server.post("/v1/chat/completions", tools=TOOLS)).json()["choices"][0]
    assert (whole["finish_reason"], whole["message"]["content"]) == ("stop", "Hello")
    assert "tool_calls" not in whole["message"]
    assert server.generator.jobs[0].state.grammar
    assert not (await server.post("/v1/chat/completions", tools=TOOLS, tool_choice="none")).is_error
    assert not server.generator.jobs[1].state.grammar
    both = await server.post("/v1/chat/completions", tools=TOOLS, response_format={"type": "json_object"})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "tools")


@every_path
async def test_an_unknown_model_is_not_found(path: str) -> None:
    answer = await Server().post(path, model="other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_reading_a_long_prompt_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, read_on = threading.Event(), threading.Event()
    tokenize = CharacterTokenizer.__call__

    def slowly(self: CharacterTokenizer, text: str) -> Json:
        reading.set()
        assert read_on.wait(PATIENCE_S)
        return tokenize(self, text)

    monkeypatch.setattr(CharacterTokenizer, "__call__", slowly)
    server = Server(chr(END))
    slow = asyncio.create_task(server.post("/v1/completions"))
    await until(reading.is_set)
    assert (await server.ask("GET", "/health")).status_code == 200
    assert not slow.done()
    read_on.set()
    assert (await slow).status_code == 200


async def test_prompts_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, tokenize = threading.Lock(), CharacterTokenizer.__call__

    def alone(self: CharacterTokenizer, text: str) -> Json:
        assert lock.acquire(blocking=False)
        try:
            return tokenize(self, text)
        finally:
            lock.release()

    monkeypatch.setattr(CharacterTokenizer, "__call__", alone)
    server = Server(chr(END))
    answers = await asyncio.gather(*(server.post("/v1/completions") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}


async def test_waiting_for_a_turn_to_be_read_is_part_of_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    read_on = threading.Event()
    monkeypatch.setattr(
        CharacterTokenizer, "__call__", lambda *_: {"input_ids": [5] * read_on.wait(PATIENCE_S)}
    )
    server = Server(chr(END), request_deadline_s=0.05)
    try:
        answers = await asyncio.gather(*(server.post("/v1/completions") for _ in range(3)))
    finally:
        read_on.set()
    assert [answer.json()["error"]["code"] for answer in answers] == ["timeout"] * 3


async def test_a_body_that_does_not_come_is_part_of_the_deadline() -> None:
    async with Server(request_deadline_s=0.05).connection("/v1/completions") as connection:
        assert (await connection.sent())["status"] == 503


async def test_a_client_that_leaves_within_its_body_is_no_internal_error() -> None:
    server = Server(chr(END))
    async with server.connection("/v1/completions") as connection:
        await turns(3)
        connection.gone.set()
        assert (await connection.sent())["status"] == 400
    assert server.ledger.refused == ["the request broke off before its end"]
