"""What requests may hold, in the OpenAI HTTP format. Knows JSON and names; nothing of tokenizers or targets.

A parameter that would change the answer and is not supported is refused; one that asks for nothing is accepted.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.config import Depth, NumNodes
from deployments.errors import RequestError
from taps.composing import STRATEGIES
from taps.sampling import LEAST_TEMPERATURE

R = TypeVar("R", bound="_Request")

# Parameters that never change the text of an answer.
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction",
    "parallel_tool_calls", "moderation", "prompt_cache_retention", "prompt_cache_options",
}  # fmt: skip
# Parameters that would change the answer unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "function_call": ("none", "auto", None),
    "modalities": (["text"], None),
    "audio": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def _is_neutral(name: str, value: Any) -> bool:
    """Whether the value asks for nothing; 0 is not False here."""
    return any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL.get(name, ()))


class TapsOptions(BaseModel):
    """How this request is speculated on; never changes its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    strategy: str | None = None
    drafters: list[str] | None = None
    num_nodes: NumNodes | None = None
    depth: Depth | None = None

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in STRATEGIES:
            raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(STRATEGIES)}")
        return name


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class _Request(BaseModel):
    """What both endpoints share. Where a request is silent, OpenAI's defaults hold."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    taps: TapsOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_supported(self) -> _Request:
        for name, value in (self.model_extra or {}).items():
            if name in _WITHOUT_EFFECT or _is_neutral(name, value):
                continue
            raise ValueError(
                f"{name!r} = {json.dumps(value)[:80]} is not supported by this server; leave it out"
            )
        return self

    @field_validator("stop")
    @classmethod
    def _few_short_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > 16 or any(len(string) > 256 for string in strings):
            raise ValueError("at most 16 stop strings of at most 256 characters")
        return stop

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"below {LEAST_TEMPERATURE:g} but not 0; send 0 for the likeliest tokens")
        return temperature

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def options(self) -> TapsOptions:
        return self.taps or TapsOptions()

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """Clients send our own answers back with fields such as `refusal: null`: empty ones are fine."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="after")
    def _refuse_what_is_not_supported(self) -> ChatMessage:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}):
                raise ValueError(f"{name!r} in a message is not supported by this server; leave it out")
        return self

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionRequest(_Request):
    """POST /v1/completions. One prompt: a string, or token ids."""

    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        """Without the list around a single text."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ValueError("one prompt per request; send several requests, they are batched")
            prompt = prompt[0]
        if not prompt:
            raise ValueError("the prompt is empty")
        return prompt


def parse_chat(body: bytes) -> ChatRequest:
    return _validated(ChatRequest, body)


def parse_completion(body: bytes) -> CompletionRequest:
    return _validated(CompletionRequest, body)


def _validated(model: type[R], body: bytes) -> R:
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not JSON: {error}") from error
    try:
        return model.model_validate(parsed)
    except ValidationError as error:
        where, reason = complaint(error)
        raise RequestError(f"{where}: {reason}" if where else reason, param=where or None) from error


def complaint(error: ValidationError) -> tuple[str, str]:
    """Which field is wrong, and why; of a union's alternatives, the one that came closest."""
    found = max(error.errors(), key=lambda found: len(found["loc"]))
    where = ".".join(str(part) for part in found["loc"] if not _is_union_tag(part))
    return where, found["msg"].removeprefix("Value error, ")


def _is_union_tag(part: int | str) -> bool:
    """Whether pydantic put this part of a location there to name a member of a union."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
