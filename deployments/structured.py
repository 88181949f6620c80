"""Answers of a given form: from what requests say of it to the grammar that the verifier keeps to.

OpenAI's `response_format`, and vLLM's extensions. Knows JSON and grammars; nothing of targets or decoding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from deployments.errors import RequestError

# As models write it: with free whitespace a small one goes on with it until its tokens end.
COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_CHARACTERS = 200_000
ANY_OBJECT = {"type": "object"}
# The grammar library keeps to these, and refuses others, which JSON Schema takes for notes to readers.
_FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
_DATA = {"const", "default", "enum", "example", "examples"}  # what is in them is no schema
_NAMED = {"$defs", "definitions", "patternProperties", "properties"}  # schemas by names, whatever these are


def grammar_of(asked: Mapping[str, Any]) -> str:
    """The grammar, in `llguidance`'s notation; nothing where no form is asked for.

    Args: asked: parameters by name, those that were given. Raises `RequestError` where there are several, or
    where one cannot be used.
    """
    given = [(name, value) for name, value in asked.items() if value is not None]
    found = [(name, *form) for name, value in given if (form := _form(name, value)) is not None]
    if not found:
        return ""
    if len(found) > 1:
        names = " and ".join(name for name, *_ in found)
        raise RequestError(f"{names}: an answer has one form; leave out all but one", found[1][0])
    name, kind, value = found[0]
    if len(value if isinstance(value, str) else json.dumps(value)) > MOST_CHARACTERS:
        raise RequestError(f"{name} has more than {MOST_CHARACTERS} characters", name)
    try:
        grammar = _GRAMMARS[kind](value)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{name} cannot be used: {error}", name) from error
    return checked(grammar, name)


@lru_cache(64)  # applications ask for the same forms again, and for one form of many prompts
def checked(grammar: str, where: str) -> str:
    """The same. Raises `RequestError` where it is none. Args: where: the parameter that it comes from."""
    is_bad, said = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_bad:
        raise RequestError(f"{where} cannot be used: {said[0].splitlines()[0]}", where)
    return grammar


def _form(name: str, value: Any) -> tuple[str, Any] | None:
    """What kind of form a parameter asks for, and which; None where for none."""
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        kinds = [(kind, said) for kind, said in value.items() if said is not None and said is not False]
        known = [pair for pair in kinds if pair[0] in _GRAMMARS]
        if len(kinds) != len(known) or len(known) > 1:
            raise RequestError(f"structured_outputs has one of {', '.join(_GRAMMARS)}", name)
        return known[0] if known else None
    return name.removeprefix("guided_"), value


def _response_format(value: Mapping[str, Any]) -> tuple[str, Any] | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return "json_object", True
    if kind == "json_schema":
        schema = value.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, Mapping) else None
        if schema is None:
            raise RequestError("a json_schema needs a schema", "response_format.json_schema.schema")
        return "json", schema
    raise RequestError(f"the type is text, json_object or json_schema, not {kind!r}", "response_format.type")


def _json(schema: Any) -> str:
    if not isinstance(schema, str | dict | bool):
        raise TypeError("a schema is an object, or one in a string")
    return json_grammar(json.loads(schema) if isinstance(schema, str) else schema)


def json_grammar(schema: Any) -> str:
    """Of documents of a JSON schema. Raises ValueError where it cannot be used."""
    return LLMatcher.grammar_from_json_schema(json.dumps(without_notes(schema)), overrides=COMPACT)


def without_notes(schema: Any) -> Any:
    """A schema without the formats that are none to the grammar library, such as pydantic's `password`."""
    if isinstance(schema, list):
        return [without_notes(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            kept[key] = {name: without_notes(one) for name, one in value.items()}
        elif key in _DATA:
            kept[key] = value
        elif key != "format" or not isinstance(value, str) or value in _FORMATS:
            kept[key] = without_notes(value)
    return kept


def _choice(texts: Any) -> str:
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or not texts or not all(isinstance(text, str) and text for text in texts):
        raise TypeError("choices are a list of texts, none of them empty")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("it is a text that is not empty")
    return value


def _grammar(value: Any) -> str:
    """Of Lark, or GBNF, whose reader raises exceptions of no kind of their own."""
    text = _text(value)
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:
        raise ValueError(str(error)) from error


_GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json": _json,
    "json_object": lambda _: _json(ANY_OBJECT),
    "regex": lambda regex: LLMatcher.grammar_from_regex(_text(regex)),
    "choice": _choice,
    "grammar": _grammar,
}
