"""Answers in the OpenAI HTTP format: whole, in chunks, and errors. Knows JSON and records, not requests."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from deployments.errors import RequestError
from deployments.logprobs import Told, in_chat, in_completion
from deployments.record import RequestRecord
from deployments.tools import CallDelta
from taps.decoding.delivery import FinishReason

Json = dict[str, Any]
Kind = Literal["chat", "completion"]
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# Beside what JSON itself escapes: what careless clients take for the end of a line, and what UTF-8 has not.
_UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(record: RequestRecord) -> Json:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.new_tokens,
        "total_tokens": record.prompt_tokens + record.new_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


def speculation(record: RequestRecord) -> Json:
    """`metrics` of a response, in vLLM's per-request form, plus accepted tokens by drafter and times."""
    counts = record.counts
    by_drafter = {name: counts.accepted_by_drafter[i] for i, name in enumerate(record.drafters)}
    explained = {} if record.steps is None else {"steps": record.steps}
    return {
        **explained,
        "speculative_decoding": {
            "acceptance_histogram": counts.histogram(),
            "num_spec_steps": counts.num_passes,
            "num_plain_steps": counts.num_plain_passes,
            "num_spec_tokens": counts.max_depth,
            "num_draft_tokens": counts.num_draft_tokens,
            "num_accepted_draft_tokens": counts.num_accepted,
            "mean_acceptance_length": counts.acceptance_length,
            "draft_acceptance_rate": counts.draft_acceptance_rate,
            "accepted_by_drafter": by_drafter,
        },
        "per_pass": record.per_pass,
    }


def _summary(record: RequestRecord) -> Json:
    """What an answer ends with."""
    return {"usage": usage(record), "metrics": speculation(record)}


class Piece(NamedTuple):
    """What a step adds to one answer of a request."""

    text: str
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    answer: int = 0  # index among the request's
    told: Sequence[Told] = ()  # of its tokens, where log-probabilities are asked for
    tokens: Sequence[int] | None = None  # themselves, where they are asked for; ...
    prompt: Sequence[int] | None = None  # ... and the prompt's, with an answer's first piece
    calls: Sequence[CallDelta] = ()  # what it adds to the tools' calls
    step: Json | None = None  # what was done for it, where that is asked for


class Writer:
    """Writes a request's answers in the form of one endpoint, whole or in chunks."""

    def __init__(self, kind: Kind, model: str, include_usage: bool = False) -> None:
        self._chat = kind == "chat"
        self.include_usage = include_usage  # in a stream: null on every chunk but the last
        self.id = new_id("chatcmpl" if self._chat else "cmpl")
        self._model = model
        self._created = int(time.time())
        self._begun: set[int] = set()  # answers
        self._around: dict[int, tuple[bytes, bytes]] = {}  # what stands around a chunk's text, by answer
        self._offsets: Counter[int] = Counter()  # of the next token in each text, where that is told

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, pieces: Sequence[Piece], record: RequestRecord) -> Json:
        """Args: pieces: of all answers, each one's in their order."""
        answers: dict[int, list[Piece]] = {}
        for piece in pieces:
            answers.setdefault(piece.answer, []).append(piece)
        joined = [_joined(answers[index]) for index in sorted(answers)]
        kind = "chat.completion" if self._chat else "text_completion"
        ids = _prompt_ids(joined[0]) if self._chat else {}
        choices = [self._choice(answer) for answer in joined]
        return {**self._head(kind), **ids, "choices": choices, **_summary(record)}

    def _choice(self, answer: Piece) -> Json:
        shown = {"index": answer.answer, "finish_reason": answer.finish_reason, "logprobs": self._told(answer)}
        if self._chat:
            message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.calls:
                message |= {"content": answer.text or None, "tool_calls": _calls(answer.calls)}
            return {**shown, "message": message, **_token_ids(answer)}
        return {**shown, "text": answer.text, **_prompt_ids(answer), **_token_ids(answer)}

    def chunks(self, piece: Piece) -> Iterator[bytes]:
        """The events of a piece. Text and a reason come apart: clients stop reading where there is a reason."""
        is_first = piece.answer not in self._begun
        self._begun.add(piece.answer)
        if is_first and (self._chat or piece.prompt is not None):
            yield self._chunk(piece, "assistant")
        elif piece.told or piece.tokens or piece.calls or piece.step:
            yield self._chunk(piece)
        elif piece.text or is_first:
            before, after = self._around_text(piece.answer)
            yield b"%b%b%b" % (before, _encoded(piece.text), after)
        if piece.finish_reason is not None:
            what: Json = {"delta": {}} if self._chat else {"text": ""}
            yield self._chunk_of(piece.answer, {**what, "logprobs": None, "finish_reason": piece.finish_reason})

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text of a chunk that is text alone: all of an answer share it."""
        if index not in self._around:
            text = new_id("text")  # found nowhere else
            before, _, after = self._chunk(Piece(text, answer=index)).partition(_encoded(text))
            self._around[index] = before, after
        return self._around[index]

    def _chunk(self, piece: Piece, role: str | None = None) -> bytes:
        shown = {"logprobs": self._told(piece), "finish_reason": None}
        if not self._chat:
            what = {"text": piece.text, **shown, **_prompt_ids(piece), **_token_ids(piece)}
            return self._chunk_of(piece.answer, what, _step(piece))
        delta: Json = {"role": role} if role else {}
        if piece.text or not piece.calls:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [_call_delta(call) for call in piece.calls]
        what = {"delta": delta, **shown, **_token_ids(piece)}
        return self._chunk_of(piece.answer, what, {**_prompt_ids(piece), **_step(piece)})

    def _chunk_of(self, index: int, what: Json, beside: Json | None = None) -> bytes:
        return _event({**self._chunk_head(), **(beside or {}), "choices": [{"index": index, **what}]})

    def _told(self, piece: Piece) -> Json | None:
        """Log-probabilities of the next delivered tokens; null where there are none."""
        if not piece.told:
            return None
        if self._chat:
            return in_chat(piece.told)
        offset = self._offsets[piece.answer]
        self._offsets[piece.answer] += sum(len(one.own.text) for one in piece.told)
        return in_completion(piece.told, offset)

    def usage_chunk(self, record: RequestRecord) -> bytes:
        return _event({**self._chunk_head(), "choices": [], **_summary(record)})

    def _chunk_head(self) -> Json:
        head = self._head("chat.completion.chunk" if self._chat else "text_completion")
        return {**head, "usage": None} if self.include_usage else head


def _joined(pieces: Sequence[Piece]) -> Piece:
    """One answer's pieces as one."""
    first, last = pieces[0], pieces[-1]
    text = "".join(piece.text for piece in pieces)
    told = [one for piece in pieces for one in piece.told]
    tokens = None if first.tokens is None else [token for piece in pieces for token in piece.tokens or ()]
    calls = [call for piece in pieces for call in piece.calls]
    return Piece(text, last.finish_reason, first.answer, told, tokens, first.prompt, calls)


def _call_delta(call: CallDelta) -> Json:
    if call.name is None:
        return {"index": call.call, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.call, "id": new_id("call"), "type": "function", "function": function}


def _calls(deltas: Sequence[CallDelta]) -> list[Json]:
    """The calls that these add up to."""
    calls: list[Json] = []
    for delta in deltas:
        if delta.name is not None:
            calls.append({"id": new_id("call"), "type": "function", "function": {"name": delta.name}})
        function = calls[delta.call]["function"]
        function["arguments"] = function.get("arguments", "") + delta.arguments
    return calls


def _token_ids(piece: Piece) -> Json:
    """vLLM's, as is what the prompt's are called."""
    return {} if piece.tokens is None else {"token_ids": list(piece.tokens)}


def _step(piece: Piece) -> Json:
    return {} if piece.step is None else {"taps": piece.step}


def _prompt_ids(piece: Piece) -> Json:
    return {} if piece.prompt is None else {"prompt_token_ids": list(piece.prompt)}


def error_event(error: RequestError) -> bytes:
    """An error after the stream has begun: the status line is gone, so it goes in an event."""
    return _event(error.body())


DONE = b"data: [DONE]\n\n"


def _event(payload: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % _encoded(payload)


def _encoded(value: object) -> bytes:
    """JSON in UTF-8, on one line whatever a client takes for the end of one."""
    encoded = _ENCODER.encode(value)
    if not encoded.isascii():
        encoded = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", encoded)
    return encoded.encode()


def model_card(name: str, created: int, max_model_len: int) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "taps",
        "max_model_len": max_model_len,
    }


def model_list(cards: Sequence[Json]) -> Json:
    return {"object": "list", "data": list(cards)}
