"""Other people's clients against a running server, as their documentation has them: chats, tools and forms.

    pip install openai langchain-openai langgraph litellm
    python -m cluster.clients [--url http://127.0.0.1:8000]

Says of each check whether it holds; ends with 1 where one does not. Clients that are not installed are named
and left out. Knows clients; nothing of the server but its address.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal

import httpx
from pydantic import BaseModel

from cluster.status import DEFAULT_URL

QUESTION = "How is the weather in Rome?"
USER: list[Any] = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Weather(BaseModel):
    """What the weather is."""

    sky: Literal["sunny", "cloudy", "rainy"]
    degrees: int


def openai_chat(url: str, model: str) -> None:
    """Streamed and whole, with usage, choices and log-probabilities."""
    client = _openai(url)
    asked: dict[str, Any] = {"model": model, "messages": USER, "max_tokens": 16}
    whole = client.chat.completions.create(**asked, temperature=0, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    _expect(text == whole.choices[0].message.content, "the stream says what the whole answer says")
    _expect(len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens, "each token is told")
    _expect(len(client.chat.completions.create(**asked, n=3).choices) == 3, "there are three choices")


def openai_form(url: str, model: str) -> None:
    """An answer parsed into a model of pydantic's."""
    answer = _openai(url).chat.completions.parse(
        model=model, messages=USER, response_format=Weather, max_tokens=64
    )
    _expect(isinstance(answer.choices[0].message.parsed, Weather), "the answer is parsed")


def openai_tools(url: str, model: str) -> None:
    """A call, and what came of it taken back."""
    client = _openai(url)
    messages = [*USER]
    asked: dict[str, Any] = {"model": model, "tools": [TOOL], "max_tokens": 64, "temperature": 0}
    first = client.chat.completions.create(**asked, messages=messages, tool_choice="required").choices[0]
    _expect(first.finish_reason == "tool_calls", "it ends with calls")
    messages.append(first.message)
    for call in first.message.tool_calls:
        _expect(
            json.loads(call.function.arguments)["city"] in ("Oslo", "Rome"), "its arguments are of their schema"
        )
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"})
    second = client.chat.completions.create(**asked, messages=messages, tool_choice="none").choices[0]
    _expect(bool(second.message.content), "there is an answer")


def langchain_form(url: str, model: str) -> None:
    """`with_structured_output`, as it asks by default."""
    found = _langchain(url, model).with_structured_output(Weather).invoke(QUESTION)
    _expect(isinstance(found, Weather), "the answer is parsed")


def langchain_agent(url: str, model: str) -> None:
    """A graph that calls a tool and answers, for two turns of one conversation."""
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import StructuredTool
    from langgraph.checkpoint.memory import InMemorySaver
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode

    def get_weather(city: Literal["Oslo", "Rome"]) -> str:
        """The weather in a city."""
        return f"It is sunny in {city}, 25 degrees."

    chat, tool = _langchain(url, model), StructuredTool.from_function(get_weather)
    calling, answering = chat.bind_tools([tool], tool_choice="required"), chat.bind_tools([tool])

    def call(state: Any) -> Any:
        return {"messages": [calling.invoke(state["messages"])]}

    def answer(state: Any) -> Any:
        return {"messages": [answering.invoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node("call", call).add_node("tools", ToolNode([tool]))
    graph = graph.add_node("answer", answer).add_edge(START, "call").add_edge("call", "tools")
    agent = graph.add_edge("tools", "answer").add_edge("answer", END).compile(checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "1"}}
    for text in (QUESTION, "And in Oslo?"):
        said = agent.invoke({"messages": [HumanMessage(text)]}, thread)["messages"]
    kinds = [message.type for message in said]
    _expect(kinds.count("tool") >= 2, "a tool was called in both turns")
    _expect(kinds[-1] == "ai" and kinds.count("human") == 2, "both turns are answered")


def litellm_chat(url: str, model: str) -> None:
    """Whole, streamed, and with a tool."""
    litellm = import_module("litellm")
    asked: dict[str, Any] = {
        "model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 32,
        "temperature": 0, "messages": USER,
    }  # fmt: skip
    whole: Any = litellm.completion(**asked)
    chunks: Any = litellm.completion(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    _expect(text == whole.choices[0].message.content, "the stream says what the whole answer says")
    called: Any = litellm.completion(**asked, tools=[TOOL], tool_choice="required")
    _expect(called.choices[0].message.tool_calls[0].function.name == "get_weather", "the tool is called")


def open_webui(url: str, model: str) -> None:
    """The forms that Open WebUI sends: its list of models, a chat, a title."""
    with httpx.Client(base_url=f"{url}/v1", timeout=120, headers={"Authorization": "Bearer none"}) as client:
        listed = client.get("/models").raise_for_status().json()["data"]
        _expect(model in [one["id"] for one in listed], "the model is listed")
        parts = [{"type": "text", "text": QUESTION}]
        body: dict[str, Any] = {
            "model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
            "max_tokens": 16, "frequency_penalty": 0, "logit_bias": {}, "stop": [], "seed": None,
        }  # fmt: skip
        events = [line for line in client.post("/chat/completions", json=body).text.split("\n\n") if line]
        _expect(events[-1] == "data: [DONE]", "the stream is whole")
        last = json.loads(events[-2].removeprefix("data: "))
        _expect(last["usage"]["completion_tokens"] > 0, "it ends with usage")
        title = {"model": model, "stream": False, "max_completion_tokens": 32, "messages": body["messages"][1:]}
        answer = client.post("/chat/completions", json=title).raise_for_status().json()
        _expect(bool(answer["choices"][0]["message"]["content"]), "there is a title")


CHECKS: tuple[Callable[[str, str], None], ...] = (
    openai_chat, openai_form, openai_tools, langchain_form, langchain_agent, litellm_chat, open_webui,
)  # fmt: skip


def _openai(url: str) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def _langchain(url: str, model: str) -> Any:
    from langchain_openai import ChatOpenAI

    settings: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 64, "max_retries": 0}
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", **settings)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"it does not hold that {what}")


def main(argv: Sequence[str] | None = None) -> int:
    about = "other people's clients against a running server"
    parser = argparse.ArgumentParser(prog="python -m cluster.clients", description=about)
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server (default: %(default)s)")
    url = parser.parse_args(argv).url.rstrip("/")
    try:
        model = httpx.get(f"{url}/v1/models", timeout=10).raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"{url} does not answer: {error}", file=sys.stderr)
        return 1
    failed = 0
    for check in CHECKS:
        try:
            check(url, model)
            outcome = "holds"
        except ImportError as error:
            outcome = f"left out: {error.name} is not installed"
        except Exception as error:  # whatever a client raises is what is asked for here
            outcome, failed = f"FAILS: {type(error).__name__}: {error}", failed + 1
        print(f"{check.__name__:16} {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
