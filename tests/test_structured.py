"""What requests say of an answer's form, as a grammar."""

from __future__ import annotations

from typing import Any

import pytest
from llguidance import LLMatcher

from deployments.errors import RequestError
from deployments.structured import grammar_of, without_notes

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
STRICT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"response_format": None},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"json": None}},
    ],
)
def test_where_no_form_is_asked_for_there_is_none(asked: dict[str, Any]) -> None:
    assert grammar_of(asked) == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"response_format": STRICT}, {"guided_json": SCHEMA}),
        ({"guided_json": '{"type": "string"}'}, {"guided_json": {"type": "string"}}),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"guided_json": SCHEMA}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"guided_choice": ["a", "b"]}),
        ({"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}),
        ({"guided_grammar": 'root ::= "a"'}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
    ],
)
def test_the_same_form_may_be_asked_for_in_several_ways(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert grammar_of(one) == grammar_of(other) != ""


def test_choices_are_taken_as_they_are_written() -> None:
    grammar = grammar_of({"guided_choice": ['say "yes"', "a\\b", "line\nend", "[x]*"]})
    assert not LLMatcher.validate_grammar_with_warnings(grammar)[0]


@pytest.mark.parametrize(
    ("asked", "where", "reason"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "not 'xml'"),
        ({"response_format": {}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "needs a schema"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "cannot be used"),
        ({"guided_json": "{"}, "guided_json", "cannot be used"),
        ({"guided_regex": "("}, "guided_regex", "cannot be used"),
        ({"guided_choice": []}, "guided_choice", "a list of texts"),
        ({"guided_choice": [""]}, "guided_choice", "none of them empty"),
        ({"guided_grammar": "root ::= nowhere"}, "guided_grammar", "cannot be used"),
        ({"guided_grammar": ""}, "guided_grammar", "not empty"),
        ({"guided_regex": "a" * 200_001}, "guided_regex", "200000 characters"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_json", "one form"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "one of json"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "one of json"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused(asked: dict[str, Any], where: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        grammar_of(asked)
    assert caught.value.param == where


def test_formats_that_are_notes_to_readers_are_no_reason_to_refuse() -> None:
    """Pydantic and OpenAPI write them; those that say how a string looks are kept to."""
    noted = {
        "type": "object",
        "properties": {
            "key": {"type": "string", "format": "password"},
            "parts": {"anyOf": [{"type": "integer", "format": "int32"}, {"type": "string", "format": "uri"}]},
            "format": {"enum": [{"format": "binary"}], "default": {"format": "int64"}},
            "default": {"type": "string", "format": "path"},
        },
    }
    plain = without_notes(noted)
    assert plain["properties"] == {
        "key": {"type": "string"},
        "parts": {"anyOf": [{"type": "integer"}, {"type": "string", "format": "uri"}]},
        "format": {"enum": [{"format": "binary"}], "default": {"format": "int64"}},
        "default": {"type": "string"},
    }
    assert grammar_of({"guided_json": noted}) == grammar_of({"guided_json": plain})
