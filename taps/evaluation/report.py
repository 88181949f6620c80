"""The study's report from committed result files: tables, the paper's claims with verdicts, plots.

Everything it says is computed from the files. Knows results; nothing of models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from taps.evaluation.statistics import (
    Interval,
    QuestionCounts,
    bootstrap_mean_ratio,
    bootstrap_ratio,
    mean_ratio,
    pooled,
)

Row = dict[str, Any]
_ORDER = ("mt_bench", "gsm8k", "humaneval", "math_500", "svamp")
_SPECIALIST_OF = {"gsm8k": "math", "math_500": "math", "svamp": "math", "mt_bench": "chat", "humaneval": "code"}
# Heads that belong to one study row whatever the method that trained them.
_SUFFIXES = ("-eagle-2", "-hass")


class InvalidResults(ValueError):
    """Result files that cannot be reported on; the message says which and why."""


class Key(NamedTuple):
    """One result file: a method's heads on a benchmark at a temperature."""

    method: str
    benchmark: str
    temperature: float


Results = Mapping[Key, dict[str, Any]]


def load_results(directory: Path) -> dict[Key, dict[str, Any]]:
    """Every evaluation in `directory`, in the order tables have. Raises `InvalidResults`."""
    found: dict[Key, dict[str, Any]] = {}
    for path in sorted(directory.glob("eval-*.json")):
        try:
            result = json.loads(path.read_text())
            plan, heads = result["plan"], result["heads"]
            methods = {head["training"]["method"] for head in heads.values() if "training" in head}
            key = Key("+".join(sorted(methods)), plan["benchmark"], plan["temperature"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidResults(f"{path} is not a result of `taps eval`: {error!r}") from error
        if key in found:
            raise InvalidResults(f"{path} measures {key} a second time")
        found[key] = result
    if not found:
        raise InvalidResults(f"{directory} holds no eval-*.json; make some with `taps eval --out`")
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(key: Key) -> tuple[str, float, int, str]:
    rank = _ORDER.index(key.benchmark) if key.benchmark in _ORDER else len(_ORDER)
    return key.method, key.temperature, rank, key.benchmark


def row_of(
    result: dict[str, Any], strategy: str, coupled: bool = False, num_nodes: int | None = None
) -> Row | None:
    """The row of a strategy; heads go by their names without the method.

    Args: num_nodes: the size of its trees; None is the largest, which comes first in a result.
    """
    for row in result["rows"]:
        wanted = num_nodes is None or row["num_nodes"] == num_nodes
        if plain_name(row["strategy"]) == strategy and row["coupled"] == coupled and wanted:
            found: Row = row
            return found
    return None


def plain_name(strategy: str) -> str:
    for suffix in _SUFFIXES:
        strategy = strategy.removesuffix(suffix)
    return strategy


def counts(row: Row) -> list[QuestionCounts]:
    return [QuestionCounts(*question) for question in row["questions"]]


@dataclass(frozen=True)
class Comparison:
    """Two strategies on one result, and what the claim says of them."""

    key: Key
    ours: str
    theirs: str
    ratio: float
    interval: Interval

    @property
    def holds(self) -> bool | None:
        """Whether ours is above theirs; None where the interval does not tell."""
        if self.interval.low > 1:
            return True
        return False if self.interval.high < 1 else None

    def line(self) -> str:
        low, high = self.interval
        where = f"{self.key.benchmark}, temperature {self.key.temperature:g}, {self.key.method}"
        return f"{where}: {self.ours} / {self.theirs} = {self.ratio:.3f} [{low:.3f}, {high:.3f}]"


def compare(
    key: Key, result: dict[str, Any], ours: str, theirs: str, coupled: bool = False
) -> Comparison | None:
    """The ratio of two strategies' acceptance lengths; None where one was not measured."""
    one, other = row_of(result, ours, coupled), row_of(result, theirs, coupled)
    if one is None or other is None:
        return None
    interval = bootstrap_ratio(counts(one), counts(other))
    return Comparison(key, ours, theirs, pooled(counts(one)) / pooled(counts(other)), interval)


def compare_means(
    results: Results, method: str, temperature: float, ours: str, theirs: str, coupled: bool = False
) -> Comparison | None:
    """The same for the means over all benchmarks on which both were measured; None where there are none."""
    rows = [
        (row_of(result, ours, coupled), row_of(result, theirs, coupled))
        for key, result in results.items()
        if (key.method, key.temperature) == (method, temperature)
    ]
    both = [(counts(one), counts(other)) for one, other in rows if one is not None and other is not None]
    if not both:
        return None
    one_side, other_side = [pair[0] for pair in both], [pair[1] for pair in both]
    key = Key(method, f"mean of {len(both)} benchmarks" + ", coupled" * coupled, temperature)
    interval = bootstrap_mean_ratio(one_side, other_side)
    return Comparison(key, ours, theirs, mean_ratio(one_side, other_side), interval)


def depth_shift(key: Key, result: dict[str, Any]) -> Comparison | None:
    """The specialist's share of the accepted tokens of the paper's merged tree, deep down against at the top.

    A token that both drafters proposed counts for both. None where the specialist was not measured.
    """
    row = row_of(result, "concatenated")
    own = _SPECIALIST_OF.get(key.benchmark, "")
    by_depth = {plain_name(name): n for name, n in (row or {}).get("accepted_by_depth", {}).items()}
    if own not in by_depth or len(by_depth) < 2:
        return None
    total = [sum(column) for column in zip(*by_depth.values(), strict=True)]
    first, deep = (by_depth[own][0], total[0]), (sum(by_depth[own][2:]), sum(total[2:]))
    if not first[0] or not deep[0]:
        return None
    ratio = (deep[0] / deep[1]) / (first[0] / first[1])
    # The logarithm of a ratio of two shares is about normal (Katz et al. 1978).
    spread = 1.96 * math.sqrt(1 / deep[0] - 1 / deep[1] + 1 / first[0] - 1 / first[1])
    interval = Interval(ratio * math.exp(-spread), ratio * math.exp(spread))
    return Comparison(key, f"share of {own} at depth 3 and more", "its share at depth 1", ratio, interval)


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims and the comparisons that bear on it."""

    statement: str
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        decided = [c.holds for c in self.comparisons]
        if not decided:
            return "not measurable here"
        if all(decided):
            return "reproduced"
        if False not in decided:
            return "reproduced in part" if True in decided else "undecided: the intervals include no difference"
        return "not reproduced" if True not in decided else "mixed"


Pair = tuple[str, str]


def claims(results: Results) -> list[Claim]:
    """The claims of TAPS, each over all results that can bear on it."""

    def gather(pairs_for: Callable[[Key], Iterable[Pair]]) -> list[Comparison]:
        found = [compare(k, r, *pair) for k, r in results.items() for pair in pairs_for(k)]
        return [comparison for comparison in found if comparison is not None]

    def specialists(key: Key) -> list[Pair]:
        own = _SPECIALIST_OF.get(key.benchmark)
        return [(own, other) for other in ("math", "chat") if own in ("math", "chat") and other != own]

    def mixed(key: Key) -> list[Pair]:
        own = _SPECIALIST_OF.get(key.benchmark)
        return [("mixed-half", other) for other in ("math", "chat") if other != own]

    def means(ours: str, *others: str) -> list[Comparison]:
        runs = dict.fromkeys((k.method, k.temperature, coupled) for k in results for coupled in (False, True))
        found = [compare_means(results, m, t, ours, other, c) for m, t, c in runs for other in others]
        return [comparison for comparison in found if comparison is not None]

    shifts = [shift for k, r in results.items() if (shift := depth_shift(k, r)) is not None]
    return [
        Claim("Training specialises: each specialist is best on its own domain", gather(specialists)),
        Claim("Mixed data is robust: the mixed head beats the specialist of the other domain", gather(mixed)),
        Claim("More mixed data is better than half of it", gather(lambda _: [("mixed-full", "mixed-half")])),
        Claim("Averaging weights collapses: each specialist beats the average",
              gather(lambda _: [("math", "averaged"), ("chat", "averaged")])),
        Claim("Confidence routes better than entropy", gather(lambda _: [("confidence", "entropy")])),
        Claim("Merging (the paper's, every node of both trees) beats confidence routing",
              gather(lambda _: [("concatenated", "confidence")])),
        Claim("Ours: merging within the same 60 nodes beats confidence routing",
              gather(lambda _: [("merged", "confidence")])),
        Claim("Depth shifts towards the specialist: its share of the accepted tokens grows", shifts),
        Claim("Ours: within the same 60 nodes, on average over the benchmarks, merging beats each specialist",
              means("merged", "math", "chat", "code")),
        Claim("Ours: within the same 60 nodes, on average over the benchmarks, merging beats the mixed heads",
              means("merged", "mixed-half", "mixed-full")),
        Claim("60 merged nodes against all nodes of all trees", means("merged", "concatenated")),
    ]  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def acceptance_table(results: Results, method: str, temperature: float, coupled: bool = False) -> str:
    """τ with its interval: strategies down, benchmarks across, and their mean."""
    chosen = {k: r for k, r in results.items() if (k.method, k.temperature) == (method, temperature)}
    measured = dict.fromkeys(
        (plain_name(row["strategy"]), row["num_nodes"])
        for result in chosen.values()
        for row in result["rows"]
        if row["coupled"] == coupled
    )
    lines = []
    for name, num_nodes in measured:
        cells, lengths = [], []
        for result in chosen.values():
            row = row_of(result, name, coupled, num_nodes)
            cells.append("" if row is None else _cell(row))
            lengths += [] if row is None else [row["acceptance_length"]]
        mean = f"{sum(lengths) / len(lengths):.2f}" if len(lengths) == len(chosen) else ""
        lines.append([name, str(num_nodes or "all"), *cells, mean])
    return table(["strategy", "nodes", *(k.benchmark for k in chosen), "mean"], lines)


def _cell(row: Row) -> str:
    low, high = row["interval_95"]
    return f"{row['acceptance_length']:.2f} ({low:.2f} to {high:.2f})"


def coupling_table(results: Results) -> str:
    """What coupled drafting adds at the temperatures where it differs."""
    lines = []
    for key, result in results.items():
        for name in ("math", "chat", "code", "merged"):
            plain, coupled = row_of(result, name), row_of(result, name, True)
            if plain is not None and coupled is not None:
                interval = bootstrap_ratio(counts(coupled), counts(plain))
                ratio = coupled["acceptance_length"] / plain["acceptance_length"]
                gain = f"{ratio - 1:+.1%} ({interval.low - 1:+.1%} to {interval.high - 1:+.1%})"
                lines.append([key.method, key.benchmark, name, _cell(plain), _cell(coupled), gain])
    return table(["method", "benchmark", "strategy", "uncoupled", "coupled", "gain"], lines)


def routing_table(results: Results) -> str:
    """Which drafter confidence and entropy take, as shares of the passes."""
    lines = []
    for key, result in results.items():
        for name in ("confidence", "entropy"):
            row = row_of(result, name)
            if row is not None and (total := sum(row["chosen"].values())):
                shares = (f"{plain_name(d)} {n / total:.0%}" for d, n in row["chosen"].items())
                lines.append([key.method, key.benchmark, f"{key.temperature:g}", name, ", ".join(shares)])
    return table(["method", "benchmark", "temperature", "router", "takes"], lines)


def depth_table(results: Results) -> str:
    """Share of the passes in which at least so many drafted tokens are accepted."""
    lines = []
    for key, result in results.items():
        for name in ("math", "chat", "code", "merged"):
            if (row := row_of(result, name)) is not None:
                passes = row["histogram"]
                reached = [sum(passes[d:]) / sum(passes) for d in range(1, len(passes))]
                shares = [f"{share:.0%}" for share in reached]
                lines.append([key.method, key.benchmark, f"{key.temperature:g}", name, " ".join(shares)])
    return table(["method", "benchmark", "temperature", "strategy", "accepted at depth 1, 2, ..."], lines)


def live_table(live: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            result["plan"]["benchmark"], f"{result['plan']['temperature']:g}", str(result["plan"]["num_nodes"]),
            plain_name(row["strategy"]), f"{row['speed_ratio_median']:.2f}", f"{row['acceptance_length']:.2f}",
            f"{row['draft_ms']:.0f}", f"{row['verify_ms']:.0f}", f"{row['nodes_per_pass']:.1f}",
        ]
        for result in live
        for row in result["rows"]
    ]  # fmt: skip
    header = [
        "benchmark",
        "temperature",
        "nodes",
        "strategy",
        "speed",
        "τ",
        "draft ms",
        "verify ms",
        "nodes/pass",
    ]
    return table(header, lines)


def claims_section(found: Sequence[Claim]) -> str:
    parts = []
    for claim in found:
        details = "".join(f"- {comparison.line()}\n" for comparison in claim.comparisons)
        parts.append(f"**{claim.statement}.** {claim.verdict.capitalize()}.\n\n{details}\n")
    return "".join(parts)


def write_report(source: Path, out: Path) -> None:
    """Write README.md and its plots to `out` from the result files in `source`. Raises `InvalidResults`."""
    from taps.evaluation.plots import draw_all

    results = load_results(source)
    live = [json.loads(path.read_text()) for path in sorted(source.glob("live-*.json"))]
    out.mkdir(parents=True, exist_ok=True)
    plots = draw_all(results, out)
    (out / "README.md").write_text(report(results, live, plots))


def report(results: Results, live: Sequence[dict[str, Any]], plots: Mapping[str, str]) -> str:
    """The text. Args: plots: caption -> file name."""
    plans = [result["plan"] for result in results.values()]
    asked = {plan["benchmark"]: f"{plan['questions']} of {plan['benchmark']}" for plan in plans}
    first = plans[0]
    parts = [
        "# Specialists: what they buy\n\n"
        "Made by `taps report` from the files in `docs/results/study`; nothing here is written by hand.\n\n"
        f"Acceptance length τ: tokens per verify pass, the bonus token included, pooled over the questions of "
        f"a benchmark ({', '.join(asked.values())}), {first['new_tokens']} new tokens a turn; in brackets 95 % "
        f"bootstrap intervals over questions. Trees of {first['num_nodes']} nodes, depth {first['depth']}, "
        f"top-k {first['top_k']} where no other size is given.\n",
        "## The paper's claims\n\n" + claims_section(claims(results)),
        "## Acceptance length\n",
    ]
    for method, temperature in dict.fromkeys((k.method, k.temperature) for k in results):
        parts.append(f"### {method}, temperature {temperature:g}\n\n")
        parts.append(acceptance_table(results, method, temperature))
        if temperature:
            parts.append("\nCoupled drafting:\n\n" + acceptance_table(results, method, temperature, True))
    parts.append("## Coupled drafting\n\n" + coupling_table(results))
    parts.append("## Which drafter the routers take\n\n" + routing_table(results))
    parts.append("## Depth\n\n" + depth_table(results))
    if live:
        parts.append(
            "## Speed\n\nRatio to plain decoding in the same run, median over questions.\n\n" + live_table(live)
        )
    parts.append("## Plots\n\n" + "".join(f"![{caption}]({name})\n\n" for caption, name in plots.items()))
    return "\n".join(parts)
