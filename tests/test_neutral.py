"""Parameters that are not supported: taken where they ask for nothing, refused where they ask for something."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deployments import neutral
from deployments.errors import RequestError
from deployments.neutral import WITHOUT_EFFECT
from deployments.openai import Json
from deployments.schema import ChatRequest, CompletionRequest
from tests.test_schema import chat, completion, refusal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("temprature", 0.0),
        ("stop_strings", ["x"]),
        ("prompt", "hi"),
        ("echo", 0),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("add_special_tokens", True),
        ("allowed_token_ids", []),
        ("lora_path", "x"),
        ("mirostat", 2),
        ("grammar", "root ::= [a]"),
        ("n_predict", 5),
    ],
)
def test_a_parameter_that_would_change_the_answer_is_refused_by_name(name: str, value: object) -> None:
    error = refusal(**{name: value})
    assert (error.status, error.body()["error"]["type"], error.param) == (400, "invalid_request_error", name)
    assert repr(name) in error.message
    assert "leave it out" in error.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("add_generation_prompt", False),
        ("suffix", "end"),
        ("logprobs", 21),
        ("add_special_tokens", False),
    ],
)
def test_a_completion_parameter_that_would_change_the_answer_is_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        completion(**{name: value})


# What these servers' own defaults say, or what switches a feature off.
FILLED_IN: dict[str, Json] = {
    "vLLM": {
        "n": 1, "best_of": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": None, "stop": [], "min_tokens": 0,
        "stop_token_ids": [], "ignore_eos": False, "skip_special_tokens": True, "bad_words": [],
        "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False,
        "length_penalty": 1.0, "early_stopping": False, "truncate_prompt_tokens": None, "detokenize": True,
        "prompt_logprobs": None, "allowed_token_ids": None, "structured_outputs": None, "guided_json": None,
        "priority": 0, "kv_transfer_params": None, "return_token_ids": False,
    },
    "SGLang": {
        "top_k": -1, "min_p": 0.0, "min_tokens": 0, "regex": None, "ebnf": None, "json_schema": None,
        "repetition_penalty": 1.0, "stop_regex": None, "no_stop_trim": False, "ignore_eos": False,
        "skip_special_tokens": True, "lora_path": None, "session_params": None, "separate_reasoning": True,
        "stream_reasoning": True, "return_hidden_states": False, "rid": "1", "extra_key": None,
        "return_cached_tokens_details": False, "custom_logit_processor": None, "custom_params": None,
    },
    "llama.cpp": {
        "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "min_p": 0, "xtc_probability": 0, "xtc_threshold": 0.1,
        "typ_p": 1, "typical_p": 1.0, "tfs_z": 1.0, "repeat_last_n": 64, "repeat_penalty": 1, "top_n_sigma": -1,
        "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1, "mirostat": 0,
        "mirostat_tau": 5.0, "mirostat_eta": 0.1, "grammar": "", "n_probs": 0, "min_keep": 0, "n_keep": 0,
        "t_max_predict_ms": 0, "id_slot": -1, "cache_prompt": True, "return_tokens": False, "samplers": None,
        "timings_per_token": False, "post_sampling_probs": False, "response_fields": [], "lora": [],
        "logit_bias": [], "ignore_eos": False,
    },
    "chat templates": {
        "chat_template": None, "chat_template_kwargs": {}, "add_generation_prompt": True, "echo": False,
        "continue_final_message": False, "documents": None, "tools": [], "tool_choice": "auto",
    },
}  # fmt: skip


@pytest.mark.parametrize("server", FILLED_IN)
def test_what_clients_of_other_servers_send_filled_in_is_taken(server: str) -> None:
    assert chat(**FILLED_IN[server]).model == "m"
    assert completion(**FILLED_IN[server]).model == "m"


@pytest.mark.parametrize("endpoint", [chat, completion])
def test_special_tokens_are_added_as_the_endpoint_adds_them(endpoint: Callable[..., object]) -> None:
    taken, refused = (False, True) if endpoint is chat else (True, False)
    assert endpoint(add_special_tokens=taken)
    with pytest.raises(RequestError, match="add_special_tokens"):
        endpoint(add_special_tokens=refused)


def as_float(value: object) -> object:
    """As clients write it that have one kind of number."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("written", [lambda value: value, as_float], ids=["as it is", "as float"])
def test_a_parameter_is_taken_at_every_value_that_asks_for_nothing(written: Callable[[object], object]) -> None:
    for name, values in neutral.CHAT.items():
        assert [chat(**{name: written(value)}).model for value in values] == ["m"] * len(values), name
    for name, values in neutral.COMPLETION.items():
        assert [completion(**{name: written(value)}).model for value in values] == ["m"] * len(values), name


@pytest.mark.parametrize("name", sorted(neutral.CHAT))
def test_a_parameter_is_refused_at_any_other_value(name: str) -> None:
    for value in (5, "other", ["other"], {"other": 1}):
        assert repr(name) in refusal(**{name: value}).message


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_never_changes_an_answer_is_taken_at_any_value(name: str) -> None:
    for value in (5, "other", ["other"], {"other": 1}, True):
        assert chat(**{name: value}).model == "m"


def test_no_parameter_has_two_meanings() -> None:
    for request, neutral_values in ((ChatRequest, neutral.CHAT), (CompletionRequest, neutral.COMPLETION)):
        assert not WITHOUT_EFFECT & {*neutral_values}
        assert not {*request.model_fields} & {*WITHOUT_EFFECT, *neutral_values}


def test_stream_options_that_ask_for_more_are_refused_by_name() -> None:
    assert not chat(
        stream_options={"include_obfuscation": False, "continuous_usage_stats": False}
    ).include_usage
    assert "'continuous_usage_stats'" in refusal(stream_options={"continuous_usage_stats": True}).message
    assert refusal(stream_options={"include_usage": "yes"}).param == "stream_options.include_usage"
