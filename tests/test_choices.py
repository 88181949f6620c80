"""How many answers a request asks for, and what each of them is read from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deployments.errors import RequestError
from deployments.openai import Json
from deployments.requests import RequestReader
from tests.test_requests import read_chat, read_chats, read_completion, read_completions, reader

__all__ = ["reader"]  # the fixture


def test_choices_differ_in_their_noise_alone(reader: RequestReader) -> None:
    jobs = read_chats(reader, n=3, seed=7, taps={"strategy": "merged"})
    assert [job.state.sampling.choice for job in jobs] == [0, 1, 2]
    assert {replace(job.state.sampling, choice=0) for job in jobs} == {jobs[0].state.sampling}
    assert all(job.ask.sampling in (None, job.state.sampling) for job in jobs), "drafts know the noise"
    assert jobs[0] == read_chat(reader, seed=7, taps={"strategy": "merged"})
    unseeded = read_chats(reader, n=2)
    assert unseeded[0].state.sampling.seed == unseeded[1].state.sampling.seed


def test_each_of_several_prompts_is_answered_as_if_it_were_alone(reader: RequestReader) -> None:
    jobs = read_completions(reader, ["hello", [5, 6]], n=2, seed=7)
    assert [job.state.sampling.choice for job in jobs] == [0, 1, 0, 1]
    assert jobs[0] == read_completion(reader, "hello", seed=7)
    assert jobs[2] == read_completion(reader, [5, 6], seed=7)
    unseeded = read_completions(reader, ["a", "b"])
    assert unseeded[0].state.sampling == unseeded[1].state.sampling


@pytest.mark.parametrize(
    ("fields", "where", "reason"),
    [
        ({"n": 0}, "n", "1"),
        ({"n": 17}, "n", "16"),
        ({"n": 2, "best_of": 3}, "best_of", "n 2"),
        ({"best_of": 2}, "best_of", "leave best_of out"),
        ({"n": 16, "prompt": ["a"] * 5}, "prompt", "64 answers"),
        ({"echo": True, "logprobs": 0}, "echo", "log-probabilities of the prompt"),
        ({"echo": "yes"}, "echo", "boolean"),
    ],
)
def test_what_asks_for_answers_is_checked(reader: RequestReader, fields: Json, where: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        read_completions(reader, **{"prompt": "hello"} | fields)
    assert caught.value.param == where


def test_a_completion_may_begin_with_its_prompt(reader: RequestReader) -> None:
    jobs = read_completions(reader, ["hello", [104, 105]], echo=True)
    assert [job.echo for job in jobs] == ["hello", "hi"]
    assert read_completion(reader, "hello", best_of=1).echo == ""
    assert read_completion(reader, "hello", return_token_ids=True).tells_ids


def test_a_chat_goes_on_or_begins_as_it_is_asked_for(reader: RequestReader) -> None:
    def prompt(**fields: Any) -> str:
        return "".join(map(chr, read_chat(reader, **fields).state.tokens))

    assert prompt() == "hello"
    assert prompt(add_generation_prompt=False) == "hello>"
    assert prompt(add_generation_prompt=False, continue_final_message=True) == "hello"
    assert prompt(chat_template_kwargs={"a": 1}) == "a=1;hello"
    for fields, where in (
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "x" * 101}}, "chat_template_kwargs"),
    ):
        with pytest.raises(RequestError) as caught:
            prompt(**fields)
        assert caught.value.param == where
