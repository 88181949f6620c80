"""What requests may hold, in the OpenAI HTTP format. Knows JSON and names; nothing of tokenizers or targets.

A parameter that would change the answer and is not supported is refused; everything that asks for nothing is
accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from deployments.config import STRATEGY_NAMES, Depth, NumNodes
from deployments.conversation import Body, ChatMessage, Tool
from deployments.errors import RequestError
from deployments.neutral import (
    CHAT,
    COMPLETION,
    STREAM_OPTIONS,
    Neutral,
    asks_for_nothing,
)

R = TypeVar("R", bound="_Request")
_MOST_BIASES = 1024
_MOST_STOP_TOKENS = 128
_MOST_BAD_WORDS = 128
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_MOST_TOOLS = 128
_MOST_CHOICES = 16  # of a prompt
_MOST_ANSWERS = 64  # of a request: choices of all prompts


def _whole(value: Any) -> Any:
    """A whole number that was written as a float, as an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_WHOLE = BeforeValidator(_whole)
Tokens = Annotated[int, Field(ge=1), _WHOLE]
NumChoices = Annotated[int, Field(ge=1, le=_MOST_CHOICES), _WHOLE]
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
Prompt = str | Annotated[list[int], Field(fail_fast=True)]


def _not_supported(extra: Mapping[str, Any] | None, known: Neutral) -> Iterator[tuple[str, str]]:
    """The names that ask for something, and what is said of them."""
    for name, value in (extra or {}).items():
        if not asks_for_nothing(name, value, known):
            yield name, f"{name!r} = {json.dumps(value)[:80]} is not supported by this server; leave it out"


class TapsOptions(Body):
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


class StreamOptions(Body):
    """How an answer is streamed; without a stream they ask for nothing."""

    include_usage: bool = False

    @model_validator(mode="after")
    def _supported(self) -> StreamOptions:
        for _, reason in _not_supported(self.model_extra, STREAM_OPTIONS):
            raise ValueError(reason)
        return self


class _Request(Body):
    """What both endpoints share. Where a request is silent, OpenAI's defaults hold."""

    neutral: ClassVar[Neutral]

    model: str
    n: NumChoices | None = None
    best_of: Annotated[int, _WHOLE] | None = None
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
    return_token_ids: bool | None = None
    # The form of an answer: OpenAI's, and vLLM's.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    guided_grammar: str | None = None
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
        if self.best_of not in (None, self.num_choices):
            reason = (
                f"best_of is {self.best_of} and n {self.num_choices}: to choose among more is not supported"
            )
            raise RequestError(f"{reason}; leave best_of out", "best_of")
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
    def forms(self) -> dict[str, Any]:
        """What is said of the answer's form, by name."""
        return {name: getattr(self, name) for name in ("response_format", "structured_outputs", *_GUIDED)}

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def options(self) -> TapsOptions:
        return self.taps or TapsOptions()

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """POST /v1/chat/completions"""

    neutral = CHAT

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    # vLLM's, as chat templates have them.
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS, fail_fast=True)] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _likeliest_beside_the_token(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _goes_on_or_begins(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            reason = (
                "an answer either goes on with the final message or begins: set add_generation_prompt to false"
            )
            raise RequestError(reason, "continue_final_message")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(_Request):
    """POST /v1/completions. Prompts are strings, or token ids; one or several of them."""

    neutral = COMPLETION

    prompt: Annotated[list[Prompt], Field(fail_fast=True)]
    logprobs: Annotated[NumLogprobs | None, _FALSE_IS_NULL] = None
    echo: bool = False

    @model_validator(mode="after")
    def _few_answers(self) -> CompletionRequest:
        if len(self.prompt) * self.num_choices > _MOST_ANSWERS:
            asked = f"{len(self.prompt)} prompts with {self.num_choices} choices each"
            raise RequestError(
                f"{asked}: a request has {_MOST_ANSWERS} answers at most; send several", "prompt"
            )
        if self.echo and self.logprobs is not None:
            reason = "log-probabilities of the prompt are not supported; leave out echo or logprobs"
            raise RequestError(reason, "echo")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, prompt: Any) -> Any:
        """With a list around a single prompt."""
        has_several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        prompts = prompt if has_several else [prompt]
        if len(prompts) > _MOST_ANSWERS:
            raise ValueError(f"at most {_MOST_ANSWERS} prompts a request")
        if not all(prompts):
            raise ValueError("the prompt is empty")
        return [[_whole(token) for token in one] if isinstance(one, list) else one for one in prompts]


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
