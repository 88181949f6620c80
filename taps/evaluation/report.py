"""The study's report from committed result files: tables, the paper's claims with verdicts, plots.

Everything it says is computed from the files. Knows results; nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taps.evaluation.claims import Claim, claims
from taps.evaluation.results import Results, Row, blends, counts, load_results, plain_name, row_of
from taps.evaluation.statistics import bootstrap_ratio


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


def averaging_table(results: Results) -> str:
    """What averaging two heads' weights costs, from one head alone (λ = 0) to the other (λ = 1)."""
    lines = [
        [key.method, key.benchmark, f"{key.temperature:g}", " and ".join(of), f"{weight:g}", _cell(row)]
        for key, result in results.items()
        for of, weight, row in blends(result)
    ]
    return table(["method", "benchmark", "temperature", "heads", "λ of the first", "τ"], lines)


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
    if any(blends(result) for result in results.values()):
        parts.append("## Averaging weights\n\n" + averaging_table(results))
    if live:
        parts.append(
            "## Speed\n\nRatio to plain decoding in the same run, median over questions.\n\n" + live_table(live)
        )
    parts.append("## Plots\n\n" + "".join(f"![{caption}]({name})\n\n" for caption, name in plots.items()))
    return "\n".join(parts)
