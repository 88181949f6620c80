"""From answers to figures: what one setting came to in one round. Knows answers and clocks, not comparisons.

Times are the client's. What failed or was cut counts with its time and without its tokens, so that failing
never looks fast; it is left out of latencies and of comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

import numpy

from cluster.bench.experiment import Served
from cluster.bench.streams import Answer, Json

# What is measured, and what it means.
MEASURES = {
    "tokens_per_second": "of all streams together, from the first request to the end of the last answer",
    "tokens_per_second_per_user": "tokens of an answer over its time, prefill included; median of the answers",
    "ttft_ms_median": "time to first token: to the first chunk with text",
    "ttft_ms_p95": "",
    "ttft_ms_p99": "",
    "inter_token_ms_median": "between chunks with text, of however many tokens (ITL of `vllm bench serve`)",
    "inter_token_ms_p95": "",
    "inter_token_ms_p99": "",
    "ms_per_token_median": "from the first text to the last, over tokens - 1 (TPOT of `vllm bench serve`)",
    "acceptance_length": "tokens per verify pass, pooled",
    "nodes_per_pass": "drafted nodes verified in a pass",
    "in_flight": "answers under way, mean over the time",
}
PERCENTILES = {"median": 50, "p95": 95, "p99": 99}
Values = dict[str, float]
Unit = tuple[int, str]  # round; and question, where there is a value for each


def answers_of(served: Sequence[Served]) -> list[Answer]:
    return [answer for one in served for loop in one.loops for answer in loop.answers]


def whole(answers: Sequence[Answer]) -> list[Answer]:
    """Those that did not fail."""
    return [answer for answer in answers if answer.error is None]


def measured(served: Served) -> Values:
    """Every measure that there is a value for."""
    everything = answers_of([served])
    if not (good := whole(everything)):
        return {}
    seconds = sum(loop.seconds for loop in served.loops)
    return {
        "tokens_per_second": sum(answer.tokens for answer in good) / seconds,
        "tokens_per_second_per_user": median(answer.tokens / answer.seconds for answer in good),
        **_percentiles("ttft_ms", [s for answer in good if (s := answer.first_token_s) is not None]),
        **_percentiles("inter_token_ms", [gap for answer in good for gap in answer.gaps_s]),
        **_median("ms_per_token_median", [s for answer in good if (s := answer.per_token_s) is not None]),
        **_speculation([answer.metrics for answer in good]),
        "in_flight": sum(answer.seconds for answer in everything) / seconds,
    }


def _percentiles(name: str, seconds: Sequence[float]) -> Values:
    """In milliseconds."""
    if not seconds:
        return {}
    found = numpy.percentile(seconds, list(PERCENTILES.values())).tolist()
    return {f"{name}_{which}": value * 1e3 for which, value in zip(PERCENTILES, found, strict=True)}


def _median(name: str, seconds: Sequence[float]) -> Values:
    return {name: median(seconds) * 1e3} if seconds else {}


def _speculation(metrics: Sequence[Json]) -> Values:
    """Pooled over answers of a server that counts passes."""
    counts = [m["speculative_decoding"] for m in metrics if m.get("speculative_decoding")]
    passes = sum(c.get("num_spec_steps") or 0 for c in counts)
    if not passes:
        return {}
    committed = sum(c.get("mean_acceptance_length", 0.0) * (c.get("num_spec_steps") or 0) for c in counts)
    nodes = sum(c.get("num_draft_tokens") or 0 for c in counts)
    return {"acceptance_length": committed / passes, "nodes_per_pass": nodes / passes}


def unit_values(served: Sequence[Served], measure: str) -> dict[Unit, float]:
    """What is compared: a value a round, or one a question for the speed of one stream.

    Where anything failed there is no value.
    """
    found: dict[Unit, float] = {}
    for one in served:
        by_question = measure == "tokens_per_second" and one.cell.streams == 1
        parts = [one._replace(loops=(loop,)) for loop in one.loops] if by_question else [one]
        for part in parts:
            answers = answers_of([part])
            if len(whole(answers)) == len(answers) and (value := measured(part).get(measure)):
                found[one.round, answers[0].question if by_question else ""] = value
    return found


def server_figures(served: Sequence[Served]) -> Values:
    """Medians over answers of every other number the server gives under `metrics`, by dotted name."""
    found: dict[str, list[float]] = {}
    for answer in whole(answers_of(served)):
        others = {name: value for name, value in answer.metrics.items() if name != "speculative_decoding"}
        for name, value in flat(others).items():
            found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def flat(tree: Mapping[str, object], before: str = "") -> Values:
    """The numbers of nested objects, by dotted name."""
    found: Values = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{before}{name}"] = float(value)
    return found


def failures(served: Sequence[Served]) -> dict[str, int]:
    """What went wrong, and how often."""
    return dict(Counter(answer.error for answer in answers_of(served) if answer.error is not None))
