"""Answers in the OpenAI HTTP format: whole, in chunks, and errors. Knows JSON and records, not requests."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from deployments.errors import RequestError
from deployments.logprobs import Told, in_chat, in_completion
from deployments.record import RequestRecord
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


class Writer:
    """Writes one answer in the form of one endpoint, whole or in chunks."""

    def __init__(self, kind: Kind, model: str, include_usage: bool = False) -> None:
        self._chat = kind == "chat"
        self.include_usage = include_usage  # in a stream: null on every chunk but the last
        self.id = new_id("chatcmpl" if self._chat else "cmpl")
        self._model = model
        self._created = int(time.time())
        self._offset = 0  # of the next token in the text, where that is told

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def whole(
        self, text: str, finish_reason: FinishReason | None, record: RequestRecord, told: Sequence[Told] = ()
    ) -> Json:
        choice: Json = {"index": 0, "finish_reason": finish_reason, "logprobs": self._told(told)}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [choice], **_summary(record)}

    def first_chunk(self, text: str, told: Sequence[Told] = ()) -> bytes:
        if not self._chat:
            return self.chunk(text, told)
        return self._chunk({"delta": {"role": "assistant", "content": text}}, told=told)

    def chunk(self, text: str, told: Sequence[Told] = ()) -> bytes:
        """What all chunks of text alone share is encoded once."""
        if told:
            return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, told=told)
        before, after = self._around
        return b"%b%b%b" % (before, _encoded(text), after)

    def last_chunk(self, finish_reason: FinishReason) -> bytes:
        """Without text: clients stop reading text where there is a reason."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, finish_reason)

    @cached_property
    def _around(self) -> tuple[bytes, bytes]:
        """What stands before and after the text of a chunk."""
        text = new_id("text")  # found nowhere else
        event = self._chunk({"delta": {"content": text}} if self._chat else {"text": text})
        before, _, after = event.partition(_encoded(text))
        return before, after

    def _told(self, told: Sequence[Told]) -> Json | None:
        """Log-probabilities of the next delivered tokens; null where there are none."""
        if not told:
            return None
        if self._chat:
            return in_chat(told)
        offset, self._offset = self._offset, self._offset + sum(len(one.own.text) for one in told)
        return in_completion(told, offset)

    def _chunk(self, what: Json, finish_reason: FinishReason | None = None, told: Sequence[Told] = ()) -> bytes:
        choice = {"index": 0, **what, "logprobs": self._told(told), "finish_reason": finish_reason}
        return _event({**self._chunk_head(), "choices": [choice]})

    def usage_chunk(self, record: RequestRecord) -> bytes:
        return _event({**self._chunk_head(), "choices": [], **_summary(record)})

    def _chunk_head(self) -> Json:
        head = self._head("chat.completion.chunk" if self._chat else "text_completion")
        return {**head, "usage": None} if self.include_usage else head


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
