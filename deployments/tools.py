"""Tools: how a target is told of them, which form its calls have, and calls read from its text as it comes.

Most targets' form is Hermes', which Qwen, SmolLM and others are trained on: `<tool_call>`, an object with
`name` and `arguments`, `</tool_call>`. From 3.1 on Llama answers with one object of `name` and `parameters` and
nothing else, Mistral (up to version 7 of its tokenizers) with a list of objects like Hermes', behind a token
that is no text. Knows JSON, texts and grammars; nothing of targets or decoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deployments.errors import RequestError
from deployments.structured import ANY_OBJECT, COMPACT, checked, without_notes

Json = dict[str, Any]
Mode = Literal["auto", "required", "named"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRALS, _ID_LENGTH = "[TOOL_CALLS]", 9  # its templates refuse other ids of calls
_TOLD = """{before}You may call these functions, one JSON Schema of a function a line:
<tools>
{functions}
</tools>
To call one, write an object with its name and arguments, and nothing else of it:
<tool_call>
{{"name": <name>, "arguments": <arguments>}}
</tool_call>"""


class CallForm(NamedTuple):
    """How a target writes its calls."""

    arguments: str  # the key of these
    is_tagged: bool  # calls stand between tags, beside text and others; else they are all of an answer
    list_token: int | None = None  # behind which all of an answer is a list of calls, not one

    @property
    def is_list(self) -> bool:
        return self.list_token is not None

    @property
    def begins(self) -> str:
        """An answer without tags that is a call, or a list of them, without spaces."""
        return '[{"name":' if self.is_list else '{"name":'


HERMES, LLAMA = CallForm("arguments", True), CallForm("parameters", False)


def form_of(template: str, id_of: Callable[[str], int | None] = lambda _: None) -> CallForm:
    """What a chat template has its target write; Hermes' where it says nothing of calls.

    Args: id_of: a token's id, where there is one.
    """
    if "<|python_tag|>" in template and '"parameters": ' in template:
        return LLAMA
    mistrals = id_of(_MISTRALS) if _MISTRALS in template and "[ARGS]" not in template else None
    return HERMES if mistrals is None else CallForm("arguments", False, mistrals)


@dataclass(frozen=True)
class Tools:
    """What an answer may call."""

    functions: tuple[Json, ...]  # as requests have them: name, description, parameters
    mode: Mode = "auto"
    parallel: bool = True
    form: CallForm = HERMES

    def grammar(self) -> str:
        """Of the answer: text and calls as it likes, or nothing but calls. Raises `RequestError`."""
        calls = " | ".join(f"call_{n}" for n in range(len(self.functions)))
        lines = [f"one: {calls}"]
        before, behind = ("\n", f"\n{_CLOSE}") if self.form.is_tagged else ("", "")
        for n, function in enumerate(self.functions):
            asked = without_notes(function.get("parameters") or ANY_OBJECT)
            schema = {**asked, "x-guidance": COMPACT}
            begin = f'{before}{{"name": {json.dumps(function["name"])}, "{self.form.arguments}": '
            lines.append(f"call_{n}: {json.dumps(begin)} %json {json.dumps(schema)} {json.dumps('}' + behind)}")
        several = self.parallel and self.mode != "named"
        if not self.form.is_tagged:  # what begins with a brace, or a bracket, is a call
            answer, first = "one", "{"
            if self.form.is_list:
                more = '(", " one)*' if several else ""
                answer, first = f'<[{self.form.list_token}]> " "? "[" one {more} "]"', "\\["
            begins = f"start: {answer}" + (" | TEXT" if self.mode == "auto" else "")
            lines += [f"TEXT: /([^{first}](.|\\n)*)?/", begins]
        elif self.mode == "auto":
            lines += [
                "TEXT: /(.|\\n)*/",
                f"begun[lazy]: TEXT {json.dumps(_OPEN)}",
                "called: begun one",
                "end: TEXT",
                "start: called* end" if self.parallel else "start: called | end",
            ]
        else:
            more = f"({json.dumps(chr(10) + _OPEN)} one)*" if several else ""
            lines.append(f"start: {json.dumps(_OPEN)} one {more}")
        return checked("%llguidance {}\n" + "\n".join(lines), "tools")

    def told(self, messages: Sequence[Json]) -> list[Json]:
        """The messages for a template that knows no tools: they are told in the system's."""
        functions = "\n".join(json.dumps(function) for function in self.functions)
        first, rest = (messages[0], messages[1:]) if messages[0]["role"] == "system" else (None, messages)
        before = f"{first['content']}\n\n" if first is not None else ""
        return [{"role": "system", "content": _TOLD.format(before=before, functions=functions)}, *rest]


def tools_of(
    tools: Sequence[Json], choice: str | Mapping[str, Any] | None, parallel: bool, form: CallForm = HERMES
) -> Tools | None:
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
        return Tools(functions, "required", parallel, form)
    if choice in (None, "auto"):
        return Tools(functions, "auto", parallel, form)
    named = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else choice
    chosen = tuple(function for function in functions if function["name"] == named)
    if not chosen:
        raise RequestError(f"tool_choice names {named!r}; there are: {', '.join(names)}", "tool_choice")
    return Tools(chosen, "named", parallel, form)


def with_ids_for(form: CallForm, messages: Sequence[Json]) -> Sequence[Json]:
    """The messages with ids of calls that the template takes: of any others the last letters and digits."""
    if not form.is_list:
        return messages

    def short(id_: str) -> str:
        kept = "".join(char for char in id_ if char.isascii() and char.isalnum())
        return kept[-_ID_LENGTH:].rjust(_ID_LENGTH, "0")

    found = []
    for message in messages:
        changed = dict(message)
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [{**call, "id": short(call["id"])} for call in calls]
        if message["role"] == "tool":
            changed["tool_call_id"] = short(message.get("tool_call_id", ""))
        found.append(changed)
    return found


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


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')


class CallReader:
    """Reads one answer's text piece by piece: content, and calls."""

    def __init__(self, form: CallForm = HERMES) -> None:
        self.num_calls = 0
        self._form = form
        self._is_text = False  # all of an answer whose calls have no tags
        self._held = ""  # text that is not told yet
        self._call: _Call | None = None  # at hand
        self._is_behind_call = False  # with nothing but space since

    def push(self, text: str, is_last: bool = False) -> Said:
        """Args: is_last: nothing comes after it."""
        self._held += text
        content, calls = "", list[CallDelta]()
        read = self._content if self._form.is_tagged else self._whole
        while True:
            if self._call is None:
                content += read(is_last)
                if self._call is None:
                    return Said(content, calls)
            told, self._held = self._call.push(self._held)
            calls += told
            self.num_calls += sum(call.name is not None for call in told)
            if not self._call.is_over:
                return Said(content, calls)
            self._call, self._is_behind_call = None, True

    def _content(self, is_last: bool) -> str:
        """What is held up to the next call, which may begin. Space between and behind calls is their layout."""
        if self._is_behind_call:
            self._held = self._held.lstrip()
        before, tag, after = self._held.partition(_OPEN)
        if tag:
            self._call = _Call(self.num_calls)
        kept = "" if tag or is_last else _begun(before, _OPEN)
        self._held = after if tag else kept
        content = before[: len(before) - len(kept)]
        self._is_behind_call = self._is_behind_call and not content
        return content

    def _whole(self, is_last: bool) -> str:
        """What is held, unless it is the calls that the answer is, or may become them."""
        begins = self._form.begins
        if self._is_behind_call:
            self._held = self._held.lstrip(" \n\t,]") if self._form.is_list else ""
            if self._held:
                self._call = _Call(self.num_calls, is_tagged=False)
            return ""
        begun = "".join(self._held.split())[: len(begins)]
        self._is_text = self._is_text or not begins.startswith(begun)
        if begun == begins and not self._is_text:
            self._call = _Call(self.num_calls, is_tagged=False)
            self._held = self._held.lstrip().removeprefix("[")
        elif self._is_text or is_last:
            content, self._held = self._held, ""
            return content
        return ""


class _Call:
    """One call, from behind its opening tag to its closing one. Both may stand in its strings."""

    def __init__(self, number: int, is_tagged: bool = True) -> None:
        self.is_over = False
        self._is_tagged = is_tagged
        self._number = number
        self._depth = 0  # of objects and lists; 0 before the name is known and behind the arguments
        self._has_name = self._in_string = self._is_escaped = False

    def push(self, text: str) -> tuple[list[CallDelta], str]:
        """What the text adds, and what of it is to come again with more."""
        told = []
        if not self._has_name:
            head = _HEAD.match(text)
            if head is None:
                return [], text
            self._has_name, self._depth, text = True, 1, text[head.end() :]
            told.append(CallDelta(self._number, "", json.loads(head[1])))
        if self._depth:
            arguments = text[: self._length(text)]
            text = text[len(arguments) :]
            told += [CallDelta(self._number, arguments)] if arguments else []
        if not self._depth:
            _, tag, after = text.partition(_CLOSE if self._is_tagged else "}")
            self.is_over, text = bool(tag), after if tag else text
        return told, text

    def _length(self, text: str) -> int:
        """How much of the text is arguments: up to the brace that closes the call."""
        for at, char in enumerate(text):
            if self._in_string:
                self._in_string = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return at
        return len(text)


def _begun(text: str, tag: str) -> str:
    """The longest end of `text` that `tag` begins with."""
    return next((tag[:n] for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), "")
