"""Tools: how a target is told of them, which form its calls have, and calls read from its text as it comes.

The form is Hermes', which Qwen, SmolLM and others are trained on: `<tool_call>`, an object with `name` and
`arguments`, `</tool_call>`. Knows JSON, texts and grammars; nothing of targets or decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deployments.errors import RequestError
from deployments.structured import COMPACT, checked

Json = dict[str, Any]
Mode = Literal["auto", "required", "named"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ANY_ARGUMENTS = {"type": "object"}
_TOLD = """{before}You may call these functions, one JSON Schema of a function a line:
<tools>
{functions}
</tools>
To call one, write an object with its name and arguments, and nothing else of it:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


@dataclass(frozen=True)
class Tools:
    """What an answer may call."""

    functions: tuple[Json, ...]  # as requests have them: name, description, parameters
    mode: Mode = "auto"
    parallel: bool = True

    def grammar(self) -> str:
        """Of the answer: text and calls as it likes, or nothing but calls. Raises `RequestError`."""
        calls = " | ".join(f"call_{n}" for n in range(len(self.functions)))
        lines = [f"one: {calls}"]
        for n, function in enumerate(self.functions):
            schema = {**(function.get("parameters") or _ANY_ARGUMENTS), "x-guidance": COMPACT}
            begin = json.dumps(f'\n{{"name": {json.dumps(function["name"])}, "arguments": ')
            lines.append(f"call_{n}: {begin} %json {json.dumps(schema)} {json.dumps('}' + chr(10) + _CLOSE)}")
        if self.mode == "auto":
            lines += [
                "TEXT: /(.|\\n)*/",
                f"begun[lazy]: TEXT {json.dumps(_OPEN)}",
                "called: begun one",
                "end: TEXT",
                "start: called* end" if self.parallel else "start: called | end",
            ]
        else:
            more = f"({json.dumps(chr(10) + _OPEN)} one)*"
            several = self.parallel and self.mode == "required"
            lines.append(f"start: {json.dumps(_OPEN)} one {more if several else ''}")
        return checked("%llguidance {}\n" + "\n".join(lines), "tools")

    def told(self, messages: Sequence[Json]) -> list[Json]:
        """The messages for a template that knows no tools: they are told in the system's."""
        functions = "\n".join(json.dumps(function) for function in self.functions)
        first, rest = (messages[0], messages[1:]) if messages[0]["role"] == "system" else (None, messages)
        before = f"{first['content']}\n\n" if first is not None else ""
        return [{"role": "system", "content": _TOLD.format(before=before, functions=functions)}, *rest]


def tools_of(tools: Sequence[Json], choice: str | Mapping[str, Any] | None, parallel: bool) -> Tools | None:
    """What a request asks for; None where nothing may be called. Raises `RequestError`."""
    functions = tuple(tool["function"] for tool in tools)
    names = [function["name"] for function in functions]
    if len({*names}) < len(names):
        raise RequestError("two tools have the same name", "tools")
    if choice == "none" or (not functions and choice in (None, "auto")):
        return None
    if not functions:
        raise RequestError("there are no tools to choose from", "tool_choice")
    if choice == "required":
        return Tools(functions, "required", parallel)
    if choice in (None, "auto"):
        return Tools(functions, "auto", parallel)
    named = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else choice
    chosen = tuple(function for function in functions if function["name"] == named)
    if not chosen:
        raise RequestError(f"tool_choice names {named!r}; there are: {', '.join(names)}", "tool_choice")
    return Tools(chosen, "named", parallel)


def without_tools(messages: Sequence[Json]) -> list[Json]:
    """For a template that knows no tools: calls and what came of them as text."""
    found: list[Json] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if calls := message.get("tool_calls"):
            texts = [json.dumps({k: call["function"][k] for k in ("name", "arguments")}) for call in calls]
            said = [plain["content"]] if plain["content"] else []
            plain["content"] = "\n".join([*said, *(f"{_OPEN}\n{text}\n{_CLOSE}" for text in texts)])
        if message["role"] == "tool":
            plain |= {"role": "user", "content": f"<tool_response>\n{plain['content']}\n</tool_response>"}
            plain.pop("name", None)
            if found and found[-1].get("is_response"):
                found[-1]["content"] += f"\n{plain['content']}"
                continue
            plain["is_response"] = True
        found.append(plain)
    return [{key: value for key, value in message.items() if key != "is_response"} for message in found]


class CallDelta(NamedTuple):
    """What a text adds to one call."""

    call: int  # index among the answer's
    arguments: str  # their next characters
    name: str | None = None  # with the first of it


class Said(NamedTuple):
    """What a text adds to the answer."""

    content: str = ""
    calls: Sequence[CallDelta] = ()


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')
_TAIL = re.compile(r"\}\s*$")


class CallReader:
    """Reads one answer's text piece by piece: content, and calls."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""  # text that is not told yet
        self._in_call = False
        self._has_name = False

    def push(self, text: str, is_last: bool = False) -> Said:
        """Args: is_last: nothing comes after it."""
        self._held += text
        content, calls = "", list[CallDelta]()
        while True:
            if self._in_call:
                calls += self._arguments(is_last)
                if self._in_call:
                    break
            else:
                if self.num_calls:  # space between and behind calls is their layout
                    self._held = self._held.lstrip()
                before, tag, after = self._held.partition(_OPEN)
                kept = "" if tag or is_last else _begun(before, _OPEN)
                content += before[: len(before) - len(kept)]
                self._held = after if tag else kept
                if not tag:
                    break
                self._in_call, self._has_name = True, False
        return Said(content, calls)

    def _arguments(self, is_last: bool) -> Iterator[CallDelta]:
        """What the call at hand adds; the call may end."""
        if not self._has_name:
            head = _HEAD.match(self._held)
            if head is None:
                return
            self._held = self._held[head.end() :]
            self._has_name, self.num_calls = True, self.num_calls + 1
            yield CallDelta(self.num_calls - 1, "", json.loads(head[1]))
        body, tag, after = self._held.partition(_CLOSE)
        if tag:
            told = _TAIL.sub("", body).rstrip()
            self._held, self._in_call = after, False
        else:
            # A brace, space and the beginning of the tag may be the call's own end.
            kept = _begun(body, _CLOSE)
            bare = body[: len(body) - len(kept)].rstrip()
            bare = bare.removesuffix("}").rstrip() if bare.endswith("}") else bare
            told = body if is_last else bare
            self._held = "" if is_last else body[len(bare) :]
        if told:
            yield CallDelta(self.num_calls - 1, told)


def _begun(text: str, tag: str) -> str:
    """The longest end of `text` that `tag` begins with."""
    return next((tag[:n] for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), "")
