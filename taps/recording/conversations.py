"""What a row asks: rows of every known form as conversations, and those that cannot be used by reason.

A row is read as the first of: `messages`, `conversations` or `conversation` (turns with `role` or `from`, and
`content` or `value`), `turns` (what a user says, one after the other), `Body` with `Question`, or one of
`instruction`, `question`, `problem` and `prompt`, with `input` or `context` and with `history`. A `system`
beside any of them is the first message. A field that would change what is asked is used, or its row is left out
with a reason; fields that say something else are not read, and named. What follows the last user's turn is the
reference answer and not for us: answers are the target's own.
Knows forms; nothing of files, tokens or models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from taps.recording.rows import InvalidData, Row

EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}]}, {"conversations": [{"from": "human", '
    '"value": "..."}]}, {"instruction": "...", "input": "..."}, {"turns": ["..."]}, or a row of GSM8K '
    '("question"), MATH-500 ("problem"), SVAMP ("Body", "Question"), HumanEval or MT-Bench ("prompt")'
)
ID_FIELDS = ("question_id", "id", "unique_id", "task_id", "ID", "prompt_id")
_SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_TOOLS = ("tools", "functions", "tool_calls", "function_call", "tool_call_id")
_NO_TEXT = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos")
_TEXT_PARTS = ("text", "input_text", "output_text", None)
_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
    "tool": (
        "tool", "tools", "tool_call", "tool_response", "function", "function_call", "function_response",
        "observation", "ipython",
    ),
}  # fmt: skip
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_SHOWN = 8  # places, or names of fields

Made = TypeVar("Made")


class Unusable(Exception):
    """A row that is left out; the message is the reason, in the same words for every such row."""


class Conversation(NamedTuple):
    """What one row asks."""

    messages: tuple[dict[str, str], ...]  # up to and including the last user's; roles system, user, assistant
    is_open: bool  # of several user's turns whose answers the row does not hold
    unread: tuple[str, ...]  # fields that hold something and say nothing of what is asked


def used_rows(
    rows: Iterable[Row], source: str, make: Callable[[Row, Conversation], Made], patience: int | None = None
) -> Iterator[Made]:
    """What `make` makes of the rows that can be used; the others are counted by reason on standard output.

    Args: make: may raise `Unusable`; patience: raise `InvalidData` where so many come before the first.
    """
    left_out: dict[str, list[int]] = {}
    unread: dict[str, None] = {}
    num_used, unit = 0, ""
    try:
        for number, row in enumerate(rows, 1):
            try:
                asked = conversation(row.value)
                made = make(row, asked)
            except Unusable as error:
                left_out.setdefault(str(error), []).append(row.number)
                unit = row.unit
            else:
                num_used += 1
                unread.update(dict.fromkeys(asked.unread))
                yield made
            if number == patience and not num_used:
                raise InvalidData(f"the first {number:,} rows of {source} cannot be used; {EXPECTED}")
    finally:
        for reason, numbers in left_out.items():
            s = "s" * (len(numbers) > 1)
            where = f"{unit}{s} {_few([str(number) for number in numbers])}"
            print(f"{source}: {len(numbers):,} row{s} left out: {reason} ({where})", flush=True)
        if unread:
            print(f"{source}: not read: {_few(list(unread))}", flush=True)


def _few(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    shown = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
    further = len(names) - len(shown)
    return ", ".join(shown) + (f" and {further:,} more" if further else "")


def refuse_half_characters(*texts: str) -> None:
    """Raise `Unusable` where a text cannot be written in UTF-8: no tokenizer and no file takes it."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unusable("half a character (a lone surrogate)") from error


def conversation(row: Any) -> Conversation:
    """What a row asks. Raises `Unusable`."""
    if not isinstance(row, dict):
        raise Unusable("not a JSON object")
    fields = _Fields(row)
    fields.refuse(_TOOLS, "tools beside the text")
    fields.refuse(_NO_TEXT, "images or sounds beside the text")
    messages, is_open = _messages(fields)
    # A conversation cut out of a longer one may begin with the answer to something that is not there.
    said = list(itertools.dropwhile(lambda message: message["role"] == "assistant", messages))
    if len(said) < len(messages):
        fields.unread.append("answers that a conversation begins with")
    said = _with_system(fields.one(*_SYSTEM_FIELDS), said)
    users = [i for i, message in enumerate(said) if message["role"] == "user" and message["content"].strip()]
    if not users:
        raise Unusable("no user says anything")
    if any(message["role"] == "system" for message in said[users[-1] :]):
        raise Unusable("a system message after the last user's turn")
    return Conversation(tuple(said[: users[-1] + 1]), is_open, (*fields.rest(ID_FIELDS), *fields.unread))


def _with_system(value: Any, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Args: value: the system message beside the turns."""
    if _is_empty(value):
        return messages
    text = _text(value)
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"].strip() != text.strip():
        raise Unusable("two different system messages")
    return messages


class _Fields:
    """Fields of a row, a turn or a part, and which of them nobody asked for."""

    def __init__(self, of: Mapping[str, Any]) -> None:
        self._of = of
        self._asked_for: set[str] = set()
        self.unread: list[str] = []  # below these fields

    def one(self, *names: str, of: type | tuple[type, ...] = object) -> Any:
        """The value that these fields have in common, None where none has any. Raises `Unusable`."""
        there = [n for n in names if self._of.get(n) is not None and isinstance(self._of[n], of)]
        self._asked_for.update(there)
        there = [name for name in there if not _is_empty(self._of[name])] or there
        if any(self._of[name] != self._of[there[0]] for name in there):
            raise Unusable(f"{' and '.join(there)} say different things")
        return self._of[there[0]] if there else None

    def refuse(self, names: Iterable[str], reason: str) -> None:
        if any(not _is_empty(self._of.get(name)) for name in names):
            raise Unusable(reason)

    def rest(self, known: Iterable[str] = ()) -> list[str]:
        """Fields with a value that were not asked for."""
        seen = self._asked_for.union(known)
        return [name for name, value in self._of.items() if name not in seen and not _is_empty(value)]


def _is_empty(value: Any) -> bool:
    """Whether nothing is said: some files write an empty list as a text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or (isinstance(value, list | dict) and not value)


def _messages(fields: _Fields) -> tuple[list[dict[str, str]], bool]:
    """All messages of a row, and whether it is of several turns without their answers."""
    for name in _CONVERSATIONS:
        if (turns := fields.one(name, of=list)) is not None:
            fields.refuse(("history",), f"history beside {name}")
            return [_turn(turn, name, fields.unread) for turn in turns], False
    if (said := fields.one("turns", of=(list, str))) is not None:  # in other files it is their number
        fields.refuse(("history",), "history beside turns")
        return _users(said, fields.unread)
    return _single(fields)


def _single(fields: _Fields) -> tuple[list[dict[str, str]], bool]:
    """Messages of a row that asks in one field."""
    text = _asked(fields)
    fields.refuse(("choices", "options"), "choices beside the question")
    past, more = fields.one("history"), fields.one("input", "context")
    if isinstance(text, list):
        if not (_is_empty(past) and _is_empty(more)):
            raise Unusable("history, input or context beside several turns")
        return _users(text, fields.unread)
    asked = _text(text) + (f"\n\n{_text(more)}" if more else "")
    return [*_history(past, fields.unread), _user(asked)], False


def _asked(fields: _Fields) -> Any:
    """A text, or several."""
    if (body := fields.one("Body")) is not None:
        return _text(body).rstrip(". ") + ". " + _text(fields.one("Question"))
    if (text := fields.one("instruction", "question", "problem")) is not None:
        return text
    if (text := fields.one("prompt")) is None:
        raise Unusable("nothing is asked in any field that is known")
    return text


def _history(past: Any, unread: list[str]) -> Iterator[dict[str, str]]:
    """Earlier turns: pairs of what a user and an assistant say."""
    if _is_empty(past):
        return
    if not isinstance(past, list):
        raise Unusable("a history that is not a list")
    for pair in past:
        if isinstance(pair, dict):
            yield _turn(pair, "history", unread)
        elif isinstance(pair, list) and len(pair) == 2:
            yield _user(_text(pair[0]))
            yield {"role": "assistant", "content": _text(pair[1])}
        else:
            raise Unusable("a history that is not pairs of two texts")


def _users(said: list[Any] | str, unread: list[str]) -> tuple[list[dict[str, str]], bool]:
    """Messages of texts that a user says one after the other, or else of turns."""
    turns = said if isinstance(said, list) else [said]
    texts = [not isinstance(turn, dict) for turn in turns]
    messages = [
        _user(_text(turn)) if is_text else _turn(turn, "turns", unread)
        for turn, is_text in zip(turns, texts, strict=True)
    ]
    return messages, sum(texts) > 1


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _turn(turn: Any, within: str, unread: list[str]) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Unusable("a turn that is not an object")
    fields = _Fields(turn)
    name = fields.one("role", "from")
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role == "tool":
        raise Unusable("turns of a tool")
    if role is None:
        raise Unusable("turns of somebody else than system, user and assistant")
    fields.refuse(_TOOLS, "calls of a tool")
    fields.refuse(_NO_TEXT, "images or sounds beside the text")
    text = _text(fields.one("content", "value"))
    unread += [f"{within}.{name}" for name in fields.rest()]
    return {"role": role, "content": text}


def _text(value: Any) -> str:
    """A text; or texts of parts, a line each. Raises `Unusable`."""
    if isinstance(value, list):
        return "\n".join(_part(part) for part in value)
    if not isinstance(value, str):
        raise Unusable("null where a text belongs" if value is None else "something else where a text belongs")
    return value


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        _Fields(part).refuse(_NO_TEXT, "images or sounds beside the text")
        part = part.get("text")
    if not isinstance(part, str):
        raise Unusable("parts that are not text")
    return part
