"""Requests in the engine's terms: defaults, limits and choices. The fake tokenizer has one id per character."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.config import RouterArgs, TreeArgs
from deployments.descriptions import TargetDescription
from deployments.errors import RequestError
from deployments.openai import Json
from deployments.requests import Drafters, Generation, RequestReader
from deployments.schema import parse_chat, parse_completion
from taps.shaping import LEAST_TEMPERATURE, SamplingParams

MODEL = "SmolLM2-135M-Instruct"
TARGET = TargetDescription(vocab_size=1000, fingerprint="", max_tokens=100, numerics="table exact")
UP = Drafters(["chat", "math"], ["code"])


class CharacterTokenizer:
    eos_token_id = 2
    chat_template = "it knows tools"

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(100)}

    @classmethod
    def from_pretrained(cls, path: str) -> CharacterTokenizer:
        return cls()

    def __call__(self, text: str, add_special_tokens: bool = True) -> Json:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: object = None,
        **own: Any,
    ) -> Json:
        """A template that shows names, what it is given, and where an answer begins."""
        if messages[0]["role"] == "assistant":
            raise ValueError("an answer cannot come first")
        shown = "".join(message.get("name", "") + message["content"] for message in messages)
        end = "" if continue_final_message else ">" if add_generation_prompt is False else ""
        return self("".join(f"{name}={value};" for name, value in own.items()) + shown + end)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RequestReader:
    monkeypatch.setattr("deployments.requests.AutoTokenizer", CharacterTokenizer)
    return RequestReader(str(tmp_path), TARGET, RouterArgs(tree=TreeArgs(num_nodes=8, depth=4, top_k=4)))


def read_chats(reader: RequestReader, **fields: Any) -> list[Generation]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]} | fields
    return reader.read_chat(parse_chat(json.dumps(body).encode(), MODEL), UP)


def read_chat(reader: RequestReader, **fields: Any) -> Generation:
    (job,) = read_chats(reader, **fields)
    return job


def read_completions(reader: RequestReader, prompt: object, **fields: Any) -> list[Generation]:
    body = {"model": MODEL, "prompt": prompt} | fields
    return reader.read_completion(parse_completion(json.dumps(body).encode(), MODEL), UP)


def read_completion(reader: RequestReader, prompt: object, **fields: Any) -> Generation:
    (job,) = read_completions(reader, prompt, **fields)
    return job


def test_where_a_request_is_silent_openais_defaults_hold(reader: RequestReader) -> None:
    job = read_chat(reader, seed=5)
    assert job.state.tokens == tuple(map(ord, "hello"))
    assert job.state.sampling == SamplingParams(1.0, 1.0, 0, 0.0, 0.0, seed=5)
    assert job.state.max_tokens == 95, "all the room there is"
    assert read_completion(reader, "hello").state.max_tokens == 16
    assert job.stop == ()


def test_sampling_parameters_arrive(reader: RequestReader) -> None:
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "seed": -1,
    }
    assert read_chat(reader, **fields).state.sampling == SamplingParams(0.0, 0.5, 7, 1.0, -1.0, seed=2**64 - 1)
    assert read_chat(reader, top_k=-1).state.sampling.top_k == 0


def test_what_shapes_an_answer_arrives(reader: RequestReader) -> None:
    fields = {
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100, "5": 2.5},
        "stop_token_ids": [9, 8, 9],
        "min_tokens": 4,
        "bad_words": ["ab", " c"],
    }
    state = read_chat(reader, seed=1, **fields).state
    bias = ((5, 2.5), (7, -100.0))
    assert state.sampling == SamplingParams(min_p=0.25, repetition_penalty=1.5, logit_bias=bias, seed=1)
    assert (state.end_tokens, state.min_tokens) == ((2, 9, 8), 4)
    words = ("ab", " ab", " c")
    assert state.bad_words == tuple(tuple(map(ord, word)) for word in words)
    assert read_chat(reader, ignore_eos=True, stop_token_ids=[9]).state.end_tokens == (9,)
    assert read_chat(reader, ignore_eos=True).state.end_tokens == ()


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 7.0}, 7),
    ],
)
def test_log_probabilities_are_asked_for_in_a_chat(
    reader: RequestReader, fields: Json, number: int | None
) -> None:
    assert read_chat(reader, **fields).state.num_logprobs == number


@pytest.mark.parametrize(("value", "number"), [(None, None), (False, None), (0, 0), (5, 5)])
def test_log_probabilities_are_asked_for_in_a_completion(
    reader: RequestReader, value: object, number: int | None
) -> None:
    assert read_completion(reader, "hello", logprobs=value).state.num_logprobs == number


@pytest.mark.parametrize(
    ("fields", "where", "reason"),
    [
        ({"logit_bias": {"1000": 1}}, "logit_bias", "between 0 and 999; logit_bias has 1000"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "integer"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"stop_token_ids": [1000]}, "stop_token_ids", "between 0 and 999"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "0"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids", "128"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "6, more than the 5"),
        ({"min_tokens": -1}, "min_tokens", "0"),
        ({"min_p": 1.5}, "min_p", "1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"bad_words": [""]}, "bad_words", "character"),
        ({"bad_words": "word"}, "bad_words", "list"),
        ({"ignore_eos": "yes"}, "ignore_eos", "boolean"),
        ({"top_logprobs": 5}, "top_logprobs", "needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 3}, "logprobs", "boolean"),
    ],
)
def test_what_shapes_an_answer_is_checked(reader: RequestReader, fields: Json, where: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        read_chat(reader, **fields)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(where)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": -0.0}, {"temperature": 1e-40}, {"top_p": 0}]
)
def test_whoever_asks_for_the_likeliest_tokens_gets_greedy_decoding(
    reader: RequestReader, fields: Json
) -> None:
    params = read_chat(reader, **fields).state.sampling
    assert params.greedy
    assert params.top_p == 1.0
    assert str(params.temperature) == "0.0"


def test_the_least_temperature_is_sampled_with(reader: RequestReader) -> None:
    assert read_chat(reader, temperature=LEAST_TEMPERATURE).state.sampling.temperature == LEAST_TEMPERATURE


def test_a_name_reaches_the_chat_template(reader: RequestReader) -> None:
    messages = [{"role": "user", "name": "Ann", "content": "hello"}]
    assert read_chat(reader, messages=messages).state.tokens == tuple(map(ord, "Annhello"))


def test_unseeded_requests_draw_differently(reader: RequestReader) -> None:
    assert read_chat(reader).state.sampling.seed != read_chat(reader).state.sampling.seed


def test_max_completion_tokens_goes_before_max_tokens(reader: RequestReader) -> None:
    assert read_chat(reader, max_tokens=7).state.max_tokens == 7
    assert read_chat(reader, max_tokens=7, max_completion_tokens=9).state.max_tokens == 9


def test_a_request_that_just_fits_is_taken_and_one_token_more_is_refused(reader: RequestReader) -> None:
    assert read_completion(reader, "x" * 60, max_tokens=40).state.max_tokens == 40
    for prompt, max_tokens in [("x" * 60, 41), ("x" * 100, 1)]:
        with pytest.raises(RequestError, match="maximum context length is 100") as caught:
            read_completion(reader, prompt, max_tokens=max_tokens)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("prompt", [[0], [999]])
def test_token_ids_are_taken_as_they_are(reader: RequestReader, prompt: list[int]) -> None:
    assert read_completion(reader, prompt).state.tokens == tuple(prompt)


@pytest.mark.parametrize("prompt", [[1000], [-1]])
def test_token_ids_outside_the_vocabulary_are_refused(reader: RequestReader, prompt: list[int]) -> None:
    with pytest.raises(RequestError, match="between 0 and 999"):
        read_completion(reader, prompt)


def test_text_with_tokens_the_target_does_not_have_is_refused(reader: RequestReader) -> None:
    messages = [{"role": "user", "content": "hello \N{SNOWMAN}"}]
    with pytest.raises(RequestError, match=f"between 0 and 999; the prompt has {ord(chr(0x2603))}") as caught:
        read_chat(reader, messages=messages)
    assert caught.value.param == "messages"


def test_a_tree_that_is_too_wide_is_refused_in_one_sentence(reader: RequestReader) -> None:
    reader._args.tree.top_k = 20
    with pytest.raises(RequestError, match=r"^taps: depth \* top_k is \d+, the most is \d+$"):
        read_chat(reader, taps={"depth": 16})


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    reader: RequestReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(CharacterTokenizer, "__call__")
    with pytest.raises(RequestError, match="101 characters") as refused:
        read_completion(reader, "x" * 101)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="101 characters"):
        read_chat(reader, messages=[{"role": "user", "content": "x" * 101}])
    with pytest.raises(RequestError, match="101 characters"):
        read_chat(reader, messages=[{"role": "user", "name": "x" * 100, "content": "x"}])
    with pytest.raises(RequestError, match="101 messages"):
        read_chat(reader, messages=[{"role": "user", "content": ""}] * 101)


def test_numbers_beyond_what_travels_are_brought_into_range(reader: RequestReader) -> None:
    assert read_chat(reader, top_k=10**24).state.sampling.top_k == 2**31 - 1
    many = [f"drafter-{i}" for i in range(70)]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
    (job,) = reader.read_chat(parse_chat(json.dumps(body).encode(), MODEL), Drafters(many))
    assert len(job.drafters) == 64


def test_a_prompt_of_no_tokens_is_refused(reader: RequestReader) -> None:
    """The target would have nothing to decide a token from."""
    with pytest.raises(RequestError):
        read_chat(reader, messages=[{"role": "user", "content": ""}])


def test_another_model_is_refused_by_name(reader: RequestReader) -> None:
    with pytest.raises(RequestError, match=MODEL) as caught:
        read_chat(reader, model="gpt-5")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_messages_the_template_refuses_are_the_users_error(reader: RequestReader) -> None:
    with pytest.raises(RequestError, match="cannot come first") as caught:
        read_chat(reader, messages=[{"role": "assistant", "content": "hi"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_options_go_before_the_configuration(reader: RequestReader) -> None:
    job = read_chat(reader, taps={"strategy": "confidence", "num_nodes": 3, "depth": 2})
    assert (job.strategy, job.ask.num_nodes, job.ask.depth, job.ask.top_k) == ("confidence", 3, 2, 4)
    assert read_chat(reader).strategy == "adaptive"


@pytest.mark.parametrize("strategy", ["single", "merged", "confidence"])
def test_a_request_may_name_a_drafter_that_is_away_for_a_moment(strategy: str, reader: RequestReader) -> None:
    """As while its replica is replaced: the answer goes on without."""
    job = read_chat(reader, taps={"strategy": strategy, "drafters": ["code", "math"]})
    assert job.drafters == ("math",)
    assert read_chat(reader, taps={"strategy": strategy, "drafters": ["code"]}).drafters == ()
    with pytest.raises(RequestError, match="no drafter 'maths' is up; there are: chat, math"):
        read_chat(reader, taps={"strategy": strategy, "drafters": ["maths"]})


def test_drafters_are_told_the_noise_of_the_request_unless_the_configuration_says_no(
    reader: RequestReader, tmp_path: Path
) -> None:
    job = read_chat(reader, temperature=0.7, seed=3)
    assert job.ask.sampling == job.state.sampling == SamplingParams(0.7, seed=3)
    uncoupled = RequestReader(str(tmp_path), TARGET, RouterArgs(tree=TreeArgs(coupled=False)))
    assert read_chat(uncoupled, temperature=0.7, seed=3).ask.sampling is None


@pytest.mark.parametrize(
    ("options", "drafters"),
    [
        ({}, ("chat", "math")),
        ({"drafters": ["math"]}, ("math",)),
        ({"drafters": ["math", "chat", "math"]}, ("math", "chat")),
        ({"drafters": []}, ()),
        ({"strategy": "single", "drafters": ["math", "chat"]}, ("math",)),
        ({"strategy": "off"}, ()),
    ],
)
def test_drafters_are_those_named_or_all(
    reader: RequestReader, options: Json, drafters: tuple[str, ...]
) -> None:
    assert read_chat(reader, taps=options).drafters == drafters


def test_a_drafter_that_is_not_up_is_refused_with_those_that_are(reader: RequestReader) -> None:
    with pytest.raises(RequestError, match=r"'law'.*chat, math"):
        read_chat(reader, taps={"drafters": ["law"]})


def conversation(reader: RequestReader, *texts: str, **fields: Any) -> str:
    """Of users' and the assistant's messages in turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return read_chat(reader, messages=messages, **fields).conversation


def test_all_turns_of_a_conversation_are_known_by_its_beginning(reader: RequestReader) -> None:
    first = conversation(reader, "hello")
    assert first == conversation(reader, "hello", "good day", "go on")
    assert first != conversation(reader, "hallo", "good day", "go on")
    assert first != conversation(reader, "hello", cache_salt="mine")
    assert conversation(reader, "hello", prompt_cache_key="my key") == "my key"
    assert read_completion(reader, "hello").conversation == ""
    assert read_completion(reader, "hello", prompt_cache_key="my key").conversation == "my key"


def test_an_answer_of_a_given_form_is_asked_for_by_its_grammar(reader: RequestReader) -> None:
    asked = {"response_format": {"type": "json_object"}}
    grammar = read_chat(reader, **asked).state.grammar
    assert grammar == read_completion(reader, "hello", guided_json={"type": "object"}).state.grammar != ""
    assert read_chat(reader, response_format={"type": "text"}).state.grammar == ""
    for fields, where in (({"min_tokens": 5}, "min_tokens"), ({"ignore_eos": True}, "ignore_eos")):
        with pytest.raises(RequestError, match="ends where that ends") as caught:
            read_chat(reader, **asked, **fields)
        assert caught.value.param == where
    with pytest.raises(RequestError, match="guided_regex cannot be used"):
        read_chat(reader, guided_regex="(")
