"""What messages and tools may hold, in the OpenAI HTTP format. Knows JSON and names; nothing of templates."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.neutral import MESSAGE, is_one_of, said


class Body(BaseModel):
    """A JSON object in which `null` means that nothing was said."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, fields: Any) -> Any:
        return said(fields)


class TextPart(BaseModel):
    """A part of a message; what else clients note on it, such as `cache_control`, is not the target's."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class Function(Body):
    """A function that an answer may call."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it."""
        return self.model_dump(exclude_none=True)


class CalledFunction(Body):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _object(cls, arguments: str) -> str:
        if not isinstance(json.loads(arguments or "{}"), dict):
            raise ValueError("arguments are a JSON object, in a string")
        return arguments or "{}"


class ToolCall(Body):
    """A call that an answer made: clients send it back with what came of it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it: with arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(Body):
    """Clients send our own answers back with fields such as `refusal: null`: empty ones are fine."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} needs a content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} has no tool_calls")
        for name, value in (self.model_extra or {}).items():
            if name != "cache_control" and not is_one_of(value, MESSAGE):
                raise ValueError(f"{name!r} in a message is not supported by this server; leave it out")
        return self

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it: each part on a line of its own, a name for templates that show it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        calls = [call.plain() for call in self.tool_calls or ()]
        beside = {"name": self.name, "tool_calls": calls, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": text, **{key: value for key, value in beside.items() if value}}
