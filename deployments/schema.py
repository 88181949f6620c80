"""What requests may hold, in the OpenAI HTTP format. Knows JSON and names; nothing of tokenizers or targets.

A parameter that would change the answer and is not supported is refused; everything that asks for nothing is
accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from deployments.config import STRATEGY_NAMES, Depth, NumNodes
from deployments.errors import RequestError
from deployments.neutral import (
    CHAT,
    COMPLETION,
    MESSAGE,
    STREAM_OPTIONS,
    Neutral,
    asks_for_nothing,
    is_one_of,
    said,
)

R = TypeVar("R", bound="_Request")
_MOST_BIASES = 1024
_MOST_STOP_TOKENS = 128
_MOST_BAD_WORDS = 128


def _whole(value: Any) -> Any:
    """A whole number that was written as a float, as an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
Tokens = Annotated[int, Field(ge=1), _WHOLE]
NumLogprobs = Annotated[int, Field(ge=0, le=20), _WHOLE]
_FALSE_IS_NULL = BeforeValidator(lambda value: None if value is False else value)
TokenId = Annotated[int, Field(ge=0), _WHOLE]
# JSON has names for keys; llama.cpp's clients send an empty list.
Bias = Annotated[
    dict[Annotated[int, Field(ge=0, strict=False)], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=_MOST_BIASES),
]
LogitBias = Annotated[Bias, BeforeValidator(lambda value: {} if value == [] else value)]
BadWord = Annotated[str, Field(min_length=1, max_length=256)]


class _Body(BaseModel):
    """A JSON object in which `null` means that nothing was said."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, fields: Any) -> Any:
        return said(fields)


def _not_supported(extra: Mapping[str, Any] | None, known: Neutral) -> Iterator[tuple[str, str]]:
    """The names that ask for something, and what is said of them."""
    for name, value in (extra or {}).items():
        if not asks_for_nothing(name, value, known):
            yield name, f"{name!r} = {json.dumps(value)[:80]} is not supported by this server; leave it out"


class TapsOptions(_Body):
    """How this request is speculated on; never changes its text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    strategy: str | None = None
    drafters: list[str] | None = None
    num_nodes: Annotated[NumNodes, _WHOLE] | None = None
    depth: Annotated[Depth, _WHOLE] | None = None
    explain: bool = False  # in the answer: what each step did, and why

    @field_validator("strategy")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in STRATEGY_NAMES:
            raise ValueError(f"unknown strategy {name!r}; choose one of {', '.join(STRATEGY_NAMES)}")
        return name


class StreamOptions(_Body):
    """How an answer is streamed; without a stream they ask for nothing."""

    include_usage: bool = False

    @model_validator(mode="after")
    def _supported(self) -> StreamOptions:
        for _, reason in _not_supported(self.model_extra, STREAM_OPTIONS):
            raise ValueError(reason)
        return self


class _Request(_Body):
    """What both endpoints share. Where a request is silent, OpenAI's defaults hold."""

    neutral: ClassVar[Neutral]

    model: str
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1), _WHOLE] | None = None
    seed: Annotated[int, _WHOLE] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    # vLLM's, as other engines have them.
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=_MOST_STOP_TOKENS, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0), _WHOLE] | None = None
    ignore_eos: bool | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=_MOST_BAD_WORDS, fail_fast=True)] | None = None
    # vLLM's: what is cached of a request is used again by those of the same salt alone.
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    # OpenAI's: requests of the same key begin alike, and one verifier should answer them.
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    taps: TapsOptions | None = None

    @model_validator(mode="after")
    def _supported(self) -> _Request:
        for name, reason in _not_supported(self.model_extra, self.neutral):
            raise RequestError(reason, name)
        return self

    @field_validator("stop")
    @classmethod
    def _few_short_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > 16 or any(len(string) > 256 for string in strings):
            raise ValueError("at most 16 stop strings of at most 256 characters")
        return stop

    @property
    def stop_strings(self) -> tuple[str, ...]:
        strings = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(string for string in strings if string))

    @property
    def options(self) -> TapsOptions:
        return self.taps or TapsOptions()

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    """A part of a message; what else clients note on it, such as `cache_control`, is not the target's."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """Clients send our own answers back with fields such as `refusal: null`: empty ones are fine."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} needs a content")
        for name, value in (self.model_extra or {}).items():
            if name != "cache_control" and not is_one_of(value, MESSAGE):
                raise ValueError(f"{name!r} in a message is not supported by this server; leave it out")
        return self

    def plain(self) -> dict[str, str]:
        """As a chat template takes it: each part on a line of its own, a name for templates that show it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    neutral = CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    @model_validator(mode="after")
    def _likeliest_beside_the_token(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(_Request):
    """POST /v1/completions. One prompt: a string, or token ids."""

    neutral = COMPLETION

    prompt: str | Annotated[list[int], Field(fail_fast=True)]
    logprobs: Annotated[NumLogprobs | None, _FALSE_IS_NULL] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        """Without the list around a single prompt."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ValueError("one prompt per request; send several requests, they are batched")
            prompt = prompt[0]
        if not prompt:
            raise ValueError("the prompt is empty")
        return [_whole(token) for token in prompt] if isinstance(prompt, list) else prompt


def parse_chat(body: bytes, model_name: str) -> ChatRequest:
    """Args: model_name: of the one model there is. Raises `RequestError`."""
    return _validated(ChatRequest, body, model_name)


def parse_completion(body: bytes, model_name: str) -> CompletionRequest:
    """Args: model_name: of the one model there is. Raises `RequestError`."""
    return _validated(CompletionRequest, body, model_name)


def _validated(request: type[R], body: bytes, model_name: str) -> R:
    """The request that `body` holds. Another model is said first: whatever else is odd may be meant for it."""
    try:
        fields = _decoded(body)
        if isinstance(fields, dict) and isinstance(fields.get("model"), str) and fields["model"] != model_name:
            raise unknown_model(fields["model"], model_name)
        return request.model_validate(fields)
    except ValidationError as error:
        where, reason = complaint(error)
        raise RequestError(f"{where}: {reason}" if where else reason, param=where or None) from error
    except RecursionError as error:
        raise RequestError("the request body is nested too deeply") from error


def _decoded(body: bytes) -> Any:
    """The JSON of `body`, all of whose text can be written."""
    try:
        text = body.decode("utf-8-sig")
        fields = json.loads(text)
        if "\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RequestError(f"the request body has half of a character, {half}; send whole ones") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not JSON: {error}") from error
    return fields


def unknown_model(name: str, there: str) -> RequestError:
    reason = f"the model {name!r} does not exist; this server has {there!r}"
    return RequestError(reason, "model", 404, "model_not_found")


def complaint(error: ValidationError) -> tuple[str, str]:
    """Which field is wrong, and why; of a union's alternatives, the one that came closest."""
    found = max(error.errors(), key=lambda found: len(found["loc"]))
    where = ".".join(str(part) for part in found["loc"] if not _is_union_tag(part))
    return where, found["msg"].removeprefix("Value error, ")


def _is_union_tag(part: int | str) -> bool:
    """Whether pydantic put this part of a location there to name a member of a union."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
