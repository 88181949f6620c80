"""The running system as applications ask it: the shipped config on a real Ray cluster, stock clients."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import openai
import pytest

from cluster import clients
from tests.cluster import MODEL, QUESTION, USER, Cluster, ask, eventually, streamed_text, text_of
from tests.dashboard import expressions, metrics_of
from tests.prompts import PROMPTS

pytestmark = pytest.mark.serve


def test_chat_streamed_equals_chat_whole(cluster: Cluster) -> None:
    whole = ask(cluster)
    assert whole.usage.completion_tokens == 32
    assert whole.choices[0].finish_reason == "length"
    chunks = list(ask(cluster, stream=True, stream_options={"include_usage": True}))
    assert streamed_text(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 4


def test_completions_streamed_equal_whole(cluster: Cluster) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
    whole = cluster.client.completions.create(**options)
    chunks = list(cluster.client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 7, "top_p": 0.95}])
def test_every_strategy_gives_the_text_of_plain_decoding(cluster: Cluster, sampling: dict[str, Any]) -> None:
    plain = text_of(cluster, **sampling, extra_body={"taps": {"strategy": "off"}})
    for strategy in ("single", "confidence", "entropy", "merged", "adaptive"):
        assert text_of(cluster, **sampling, extra_body={"taps": {"strategy": strategy}}) == plain


def test_what_shapes_an_answer_shapes_it_with_every_strategy(cluster: Cluster) -> None:
    usual = ask(cluster, extra_body={"taps": {"strategy": "off"}}).choices[0].message.content
    word = usual.split()[4]
    shaping = {"repetition_penalty": 1.2, "bad_words": [word], "min_tokens": 20, "min_p": 0.05}
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 7}):
        texts = {
            text_of(cluster, **sampling, extra_body={**shaping, "taps": {"strategy": strategy}})
            for strategy in ("off", "merged", "adaptive")
        }
        (text,) = texts
        assert text
        assert word not in text


def test_choices_share_a_prompt_and_have_noise_of_their_own(cluster: Cluster) -> None:
    """Each is what plain decoding gives with its noise; the first is what one choice alone is."""
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 16}
    whole = ask(cluster, n=5, **sampling)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(5))
    assert len(set(texts)) > 1
    assert texts[0] == text_of(cluster, **sampling)
    plain = ask(cluster, n=5, **sampling, extra_body={"taps": {"strategy": "off"}})
    assert [choice.message.content for choice in plain.choices] == texts
    assert whole.usage.completion_tokens == plain.usage.completion_tokens <= 5 * 16
    assert whole.usage.prompt_tokens == ask(cluster, max_tokens=1).usage.prompt_tokens
    streamed = [""] * 5
    for chunk in ask(cluster, n=5, stream=True, **sampling):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_more_answers_than_a_verifier_has_places_are_given_on_one_lease(cluster: Cluster) -> None:
    prompts = ["One, two, three,", "Once upon a time", "The capital of France is"]
    options: dict[str, Any] = {"model": MODEL, "temperature": 1.0, "seed": 3, "max_tokens": 8}
    answer = cluster.client.completions.create(prompt=prompts, n=8, **options)
    assert len(answer.choices) == 24
    for number, prompt in enumerate(prompts):
        alone = cluster.client.completions.create(prompt=prompt, n=2, **options)
        assert [choice.text for choice in alone.choices] == [
            choice.text for choice in answer.choices[8 * number : 8 * number + 2]
        ]


def test_an_answer_goes_on_with_the_final_message(cluster: Cluster) -> None:
    whole = ask(cluster, max_tokens=24).choices[0].message.content
    begun = [*USER, {"role": "assistant", "content": whole[: len(whole) // 2].rstrip()}]
    extra = {"add_generation_prompt": False, "continue_final_message": True, "return_token_ids": True}
    answer = ask(cluster, messages=begun, max_tokens=16, extra_body=extra)
    assert answer.choices[0].message.content
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    echoed = cluster.client.completions.create(
        model=MODEL, prompt="One, two, three,", echo=True, temperature=0, max_tokens=4
    )
    assert echoed.choices[0].text.startswith("One, two, three,")
    assert len(echoed.choices[0].text) > len("One, two, three,")


def test_an_answer_keeps_to_a_schema_with_every_strategy(cluster: Cluster) -> None:
    schema = {
        "type": "object",
        "properties": {"robes": {"type": "integer"}, "colour": {"enum": ["blue", "white"]}},
        "required": ["robes", "colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "bolts", "schema": schema, "strict": True}}
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        answers = [
            ask(cluster, response_format=form, **sampling, extra_body={"taps": {"strategy": strategy}})
            for strategy in ("off", "merged", "adaptive")
        ]
        (text,) = {answer.choices[0].message.content for answer in answers}
        assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}
        found = json.loads(text)
        assert isinstance(found["robes"], int)
        assert found["colour"] in ("blue", "white")
        passes = answers[0].metrics["speculative_decoding"]["num_spec_steps"]
        assert passes < answers[0].usage.completion_tokens - 1, "what must come is drafted for nothing"
    chosen = ask(cluster, extra_body={"guided_choice": ["three bolts", "no idea"]}).choices[0].message.content
    assert chosen in ("three bolts", "no idea")


def test_a_tool_is_called_and_what_came_of_it_is_taken_back(cluster: Cluster) -> None:
    weather = {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    tools = [{"type": "function", "function": weather}]
    user = {"role": "user", "content": "How is the weather in Rome?"}
    asked = {"messages": [user], "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    first = ask(cluster, **asked)
    (call,) = first.choices[0].message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    plain = ask(cluster, **asked, extra_body={"taps": {"strategy": "off"}})
    assert plain.choices[0].message.tool_calls[0].function == call.function
    arguments = ""
    for chunk in ask(cluster, **asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += delta.function.arguments
    assert arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"}
    turns = [user, first.choices[0].message.model_dump(), result]
    assert ask(cluster, messages=turns, tools=tools, tool_choice="none").choices[0].message.content


def test_log_probabilities_are_told_whole_and_streamed(cluster: Cluster) -> None:
    whole = ask(cluster, logprobs=True, top_logprobs=2)
    content = whole.choices[0].logprobs.content
    assert "".join(one.token for one in content) == whole.choices[0].message.content
    assert len(content) == whole.usage.completion_tokens
    assert all(one.token == one.top_logprobs[0].token for one in content), "greedy text"
    plain = ask(cluster, logprobs=True, top_logprobs=2, extra_body={"taps": {"strategy": "off"}})
    assert plain.choices[0].logprobs == whole.choices[0].logprobs
    chunks = list(ask(cluster, stream=True, logprobs=True, top_logprobs=2))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [one for logprobs in told if logprobs for one in logprobs.content] == content
    completion = cluster.client.completions.create(
        model=MODEL, prompt="One, two, three,", logprobs=1, temperature=0
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == completion.choices[0].text
    assert len(logprobs.token_logprobs or ()) == len(logprobs.top_logprobs or ()) == 16


def test_metrics_count_what_was_drafted_and_accepted(cluster: Cluster) -> None:
    answer = ask(cluster, extra_body={"taps": {"strategy": "merged", "num_nodes": 8}})
    counts = answer.metrics["speculative_decoding"]
    histogram = counts["acceptance_histogram"]
    assert len(histogram) == counts["num_spec_tokens"] + 1
    assert sum(histogram) == counts["num_spec_steps"]
    assert sum(n * passes for n, passes in enumerate(histogram)) == counts["num_accepted_draft_tokens"]
    assert counts["num_accepted_draft_tokens"] > 0
    assert pytest.approx(counts["mean_acceptance_length"] * counts["num_spec_steps"]) == 31
    assert max(counts["accepted_by_drafter"].values()) <= counts["num_accepted_draft_tokens"]


def test_the_dashboard_asks_for_metrics_that_are_exported(cluster: Cluster) -> None:
    for strategy in ("merged", "off", "off"):  # with drafts and without, and with a prompt that is known
        long = [{"role": "user", "content": "Tell me more. " * 40}]  # more than a page of the cache
        ask(cluster, messages=long, extra_body={"taps": {"strategy": strategy}})
    rare = {"ray_taps_numerics_changes_total"}  # there only once it happened
    asked = metrics_of(expressions()) - rare
    eventually(cluster.metric_names, lambda names: asked <= names)
    assert all('replica="' in labels for labels in cluster.metrics("taps_cache_pages_free"))


def test_a_conversation_goes_on_with_the_clients_own_message_object(cluster: Cluster) -> None:
    said = ask(cluster, max_tokens=8).choices[0].message
    more = ask(cluster, messages=[*USER, said, {"role": "user", "content": "And then?"}], max_tokens=8)
    assert more.usage.completion_tokens > 0


def test_stop_string_ends_the_answer_before_it(cluster: Cluster) -> None:
    plain = text_of(cluster)
    word = plain.split()[6]
    answer = ask(cluster, stop=[word])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == plain[: plain.index(word)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "messages"),
        ({"taps": {"drafters": ["nobody"]}}, "nobody"),
        ({"taps": {"strategy": "magic"}}, "magic"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"n": 17}, "n"),
        ({"max_tokens": 100_000}, "context length"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "context length"),
    ],
)
def test_bad_requests_are_refused_with_a_sentence(cluster: Cluster, body: dict[str, Any], says: str) -> None:
    request = {"model": MODEL, "messages": USER, "max_tokens": 4, **body}
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=request, timeout=60)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_broken_json_is_a_400(cluster: Cluster) -> None:
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", content=b'{"model": ', timeout=60)
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_the_openai_client_raises_its_own_error(cluster: Cluster) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        cluster.client.chat.completions.create(model="other", messages=cast(Any, USER))
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(cluster, temperature=3)


def test_models_lists_the_target(cluster: Cluster) -> None:
    assert [model.id for model in cluster.client.models.list()] == [MODEL]
    assert cluster.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        cluster.client.models.retrieve("other")


def test_an_unknown_path_is_an_error_in_openais_form(cluster: Cluster) -> None:
    answer = httpx.post(f"{cluster.url}/v1/embeddings", json={}, timeout=60)
    assert answer.status_code == 404
    assert "Not Found" in answer.json()["error"]["message"]


def test_concurrent_requests_are_correct_and_share_passes(cluster: Cluster) -> None:
    asked = [(prompt, 8 + 3 * i) for i, prompt in enumerate(PROMPTS[:8])]

    def answer(prompt: str, max_tokens: int) -> str:
        return text_of(cluster, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens)

    alone = [answer(*question) for question in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: answer(*question), asked))
    assert together == alone

    def mean_batch_size() -> float:
        """Sessions per verify pass so far; Ray exports every few seconds."""
        passes = cluster.metric("taps_verify_passes_total")
        return cluster.metric("taps_verify_sessions_total") / passes if passes else 0.0

    assert eventually(mean_batch_size, lambda mean: mean > 1.05, 60) > 1.05


def test_the_edge_is_what_clients_and_browsers_expect(cluster: Cluster) -> None:
    with httpx.Client(base_url=cluster.url, headers={"Origin": "http://localhost:3000"}, timeout=60) as http:
        assert http.head("/health").status_code == 200
        assert http.get("/v1//models/").json()["data"][0]["id"] == MODEL
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert http.options("/v1/chat/completions", headers=asked).headers["access-control-allow-origin"] == "*"
        refused = http.post("/v1/completions", content=b"x" * (9 << 20))
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (413, "*")
        request = {"model": MODEL, "prompt": "Hello", "max_tokens": 2, "stream": True}
        streamed = http.post("/v1/completions", json=request)
        assert streamed.headers["x-accel-buffering"] == "no"
        assert streamed.headers["access-control-expose-headers"].lower() in streamed.headers


def test_a_stop_string_that_spells_a_special_token_is_taken(cluster: Cluster) -> None:
    assert ask(cluster, stop=["<|im_start|>"]).choices[0].message.content == text_of(cluster)


def langchain_model(cluster: Cluster) -> Any:
    from langchain_openai import ChatOpenAI  # takes a while to import, for two tests

    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 16, "max_retries": 0}
    return ChatOpenAI(base_url=f"{cluster.url}/v1", api_key="none", **settings)


def test_langchain_holds_a_conversation(cluster: Cluster) -> None:
    from langchain_core.messages import HumanMessage

    model = langchain_model(cluster)
    question = HumanMessage(QUESTION)
    answer = model.invoke([question])
    assert answer.content == text_of(cluster, max_tokens=16)
    assert "".join(str(chunk.content) for chunk in model.stream([question])) == answer.content
    more = model.invoke([question, answer, HumanMessage("And then?", name="ann")])
    assert more.usage_metadata["input_tokens"] > answer.usage_metadata["total_tokens"]


def test_langgraph_runs_a_named_agent_over_two_turns(cluster: Cluster) -> None:
    from langchain_core.messages import HumanMessage
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import START, MessagesState, StateGraph

    model = langchain_model(cluster)

    def helper(state: Any) -> dict[str, Any]:
        answer = model.invoke(state["messages"])
        answer.name = "helper"
        return {"messages": [answer]}

    agent = StateGraph(MessagesState).add_node("helper", helper).add_edge(START, "helper")
    graph = agent.compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "1"}}
    graph.invoke({"messages": [HumanMessage(QUESTION)]}, thread)
    said = graph.invoke({"messages": [HumanMessage("And then?")]}, thread)["messages"]
    assert [message.name for message in said] == [None, "helper", None, "helper"]
    assert said[1].content == text_of(cluster, max_tokens=16)
    assert said[3].content


def test_the_clients_of_others_get_what_they_expect(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clients.main(["--url", cluster.url]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count("holds") >= 6
