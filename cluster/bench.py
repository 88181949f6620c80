"""Wall-clock benchmark of a running cluster over HTTP: speculation against plain decoding, interleaved.

    python -m cluster.bench --data gsm8k.jsonl --temperature 0

Each question is asked with `off` and with the strategy, one right after the other, in changing order; the ratio
of their speeds is taken per question, so a machine whose speed drifts does not matter. The last line printed is
one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import urllib.request
from typing import Any

from taps.evaluation.questions import load_questions


def ask(
    url: str, model: str, question: str, args: argparse.Namespace, taps: dict[str, Any]
) -> dict[str, float]:
    """Tokens per second, and tokens per verify pass, of one answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
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
    speculation = answer["metrics"]["speculative_decoding"]
    return {
        "tokens": answer["usage"]["completion_tokens"],
        "seconds": seconds,
        "acceptance_length": speculation["mean_acceptance_length"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--data", required=True, help="questions, FastChat's JSONL format")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--taps", type=json.loads, default={}, help='for example {"num_nodes": 12}')
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    settings = {"off": {"strategy": "off"}, "taps": args.taps}
    ask(args.url, model, "Say hello.", args, {})
    ratios: list[float] = []
    lengths: list[float] = []
    rates: dict[str, list[float]] = {"off": [], "taps": []}
    for number, question in enumerate(load_questions(args.data, args.questions)):
        order = ("off", "taps") if number % 2 else ("taps", "off")
        seen = {name: ask(args.url, model, question.turns[0], args, settings[name]) for name in order}
        for name, rows in rates.items():
            rows.append(seen[name]["tokens"] / seen[name]["seconds"])
        ratios.append(rates["taps"][-1] / rates["off"][-1])
        lengths.append(seen["taps"]["acceptance_length"])
        print(
            f"{number + 1}: {rates['off'][-1]:.1f} -> {rates['taps'][-1]:.1f} tokens/s, ratio {ratios[-1]:.2f}"
        )
    result = {
        "questions": len(ratios),
        "temperature": args.temperature,
        "taps": args.taps,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios,
        "tokens_per_second_median": {name: statistics.median(rows) for name, rows in rates.items()},
        "acceptance_length_mean": statistics.mean(lengths),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
