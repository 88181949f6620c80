"""Wall-clock benchmark of a running cluster over HTTP: speculation against plain decoding, interleaved.

    python -m cluster.bench --data gsm8k.jsonl --temperature 0
    python -m cluster.bench --data gsm8k.jsonl --taps '{"num_nodes": 4}' --taps '{"num_nodes": 8}'

Every question is asked with `off` and with each setting, one right after the other, in changing order; ratios
of speeds are taken per question, so a machine whose speed drifts does not matter. One stream at a time; times
are those of the client, the prefill included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from taps.evaluation.questions import load_questions
from taps.provenance import made_with, refuse_unwritable, write_result

PLAIN: dict[str, Any] = {"strategy": "off"}


class Answered(NamedTuple):
    """One answer."""

    tokens: int
    passes: int  # verify passes
    verified_tokens: float  # committed by them
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def ask(
    url: str, model: str, messages: list[dict[str, str]], args: argparse.Namespace, taps: dict[str, Any]
) -> Answered:
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "taps": taps,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    seconds = time.perf_counter() - started
    counts = answer["metrics"]["speculative_decoding"]
    passes = counts["num_spec_steps"]
    return Answered(
        answer["usage"]["completion_tokens"], passes, counts["mean_acceptance_length"] * passes, seconds
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    environment = made_with()
    questions = load_questions(args.data, args.questions)
    if len(questions) < 2:
        raise ValueError(f"{args.data} holds one question; speeds are compared over at least 2")
    with urllib.request.urlopen(f"{args.url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    settings = [PLAIN, *(args.taps or [{}])]
    for taps in settings:
        ask(args.url, model, [{"role": "user", "content": "Say hello."}], args, taps)
    answers: list[list[Answered]] = [[] for _ in settings]
    for number, question in enumerate(questions):
        for i in range(len(settings)):
            which = (number + i) % len(settings)
            answers[which].append(ask(args.url, model, question.first_turn, args, settings[which]))
        plain = answers[0][-1].tokens_per_second
        ratios = ", ".join(f"{rows[-1].tokens_per_second / plain:.2f}" for rows in answers[1:])
        print(f"{number + 1}: off {plain:.1f} tokens/s, ratios {ratios}", flush=True)
    return {
        "data": Path(args.data).name,
        "questions": len(answers[0]),
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "model": model,
        "made_with": environment,
        "rows": [_row(taps, rows, answers[0]) for taps, rows in zip(settings, answers, strict=True)],
    }


def _row(taps: dict[str, Any], rows: Sequence[Answered], plain: Sequence[Answered]) -> dict[str, Any]:
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(rows, plain, strict=True)]
    return {
        "taps": taps,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)],
        "faster_than_off": f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} questions",
        "tokens_per_second_median": round(statistics.median(row.tokens_per_second for row in rows), 2),
        "acceptance_length": round(
            sum(row.verified_tokens for row in rows) / sum(row.passes for row in rows), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--data", required=True, help="questions: JSON or JSON lines, as for `taps eval`")
    parser.add_argument("--questions", type=int, default=20, help="at least 2 (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--taps", type=json.loads, action="append", help="a setting to measure (default: the server's own)"
    )
    parser.add_argument("--out", type=Path, help="where the result goes, JSON")
    args = parser.parse_args()
    if args.questions < 2 or args.max_tokens < 2:
        parser.error("speeds are compared over at least 2 questions with answers of at least 2 tokens")
    try:
        report(args)
    except (ValueError, OSError) as error:  # bad data, no server, no place for the result
        sys.exit(f"cluster.bench: {error}")


def report(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises `ValueError` of bad data and `OSError` of files and of the server."""
    if args.out:
        refuse_unwritable(args.out)
    result = measure(args)
    for row in result["rows"][1:]:
        print(
            f"{json.dumps(row['taps'])}: {row['ratio_median']:.2f} times as fast as off "
            f"(quartiles {row['ratio_quartiles'][0]:.2f} to {row['ratio_quartiles'][2]:.2f}), "
            f"{row['acceptance_length']:.2f} tokens per pass"
        )
    if args.out:
        write_result(result, args.out)


if __name__ == "__main__":
    main()
