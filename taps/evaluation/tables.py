"""The report's tables, in Markdown. Knows results and claims; nothing of the text around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from taps.evaluation.claims import Claim
from taps.evaluation.results import Results, Row, blends, counts, plain_name, row_of
from taps.evaluation.statistics import bootstrap_ratio, quartiles


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_POOLED = ("acceptance_length", "interval_95")
PER_QUESTION = ("per_question_mean", "per_question_interval_95")


def acceptance_table(
    results: Results,
    recipe: str,
    temperature: float,
    coupled: bool = False,
    measure: tuple[str, str] = _POOLED,
) -> str:
    """τ with its interval: strategies down, benchmarks across, and their mean. Args: measure: its fields."""
    chosen = {k: r for k, r in results.items() if (k.recipe, k.temperature) == (recipe, temperature)}
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
            cells.append("" if row is None else _cell(row, measure))
            lengths += [] if row is None else [row[measure[0]]]
        mean = f"{sum(lengths) / len(lengths):.2f}" if len(lengths) == len(chosen) else ""
        lines.append([name, str(num_nodes or "all"), *cells, mean])
    return table(["strategy", "nodes", *(k.benchmark for k in chosen), "mean"], lines)


def acceptance_section(results: Results, recipe: str, temperature: float, coupled: bool) -> str:
    """τ pooled, and to unfold as the mean of the questions'."""
    per_question = acceptance_table(results, recipe, temperature, coupled, PER_QUESTION)
    return (
        f"{acceptance_table(results, recipe, temperature, coupled)}\n<details>\n"
        f"<summary>Mean of the questions' own τ</summary>\n\n{per_question}\n</details>\n"
    )


def _cell(row: Row, measure: tuple[str, str] = _POOLED) -> str:
    length, (low, high) = (row[name] for name in measure)
    return f"{length:.2f} ({low:.2f} to {high:.2f})"


def heads_table(results: Results, live: Results) -> str:
    """How every head was trained, the averages left out, and what for where it was trained more than once."""
    found: dict[str, dict[tuple[str, ...], dict[str, list[str]]]] = {}  # by name, training and measurement
    for measured, files in (("τ", results), ("speed", live)):
        for key, result in files.items():
            for name, made in result["heads"].items():
                if "training" in made:
                    uses = found.setdefault(name, {}).setdefault(_trained(made), {})
                    uses.setdefault(f"{measured} at T = {key.temperature:g}", []).append(key.benchmark)
    lines = []
    for name, trainings in found.items():
        for trained, uses in trainings.items():
            used = "; ".join(f"{use}: {', '.join(dict.fromkeys(on))}" for use, on in uses.items())
            lines.append([name, *trained, used if len(trainings) > 1 else "all"])
    header = ["head", "recipe", "from", "prompts", "answer tokens", "held-out τ of chains", "used for"]
    return table(header, lines)


def _trained(made: Row) -> tuple[str, ...]:
    """Recipe, origin, data and held-out acceptance length, as words."""
    held_out = made.get("held_out")
    return (
        f"{made['training']['method']}, epochs: {made['training']['epochs']}",
        "" if made.get("init") is None else Path(made["init"]).name,
        made.get("prompts", ""),
        f"{made['answer_tokens']:,}",
        "" if held_out is None else f"{held_out['acceptance_length']:.3f}",
    )


def coupling_table(results: Results) -> str:
    """What coupled drafting adds at the temperatures where it differs; empty where it was not measured."""
    lines = []
    for key, result in results.items():
        for name in ("math", "chat", "code", "merged"):
            plain, coupled = row_of(result, name), row_of(result, name, True)
            if plain is not None and coupled is not None:
                interval = bootstrap_ratio(counts(coupled), counts(plain))
                ratio = coupled["acceptance_length"] / plain["acceptance_length"]
                gain = f"{ratio - 1:+.1%} ({interval.low - 1:+.1%} to {interval.high - 1:+.1%})"
                lines.append([key.recipe, key.benchmark, name, _cell(plain), _cell(coupled), gain])
    header = ["recipe", "benchmark", "strategy", "uncoupled", "coupled", "gain"]
    return table(header, lines) if lines else ""


def routing_table(results: Results) -> str:
    """Which drafter confidence and entropy take, as shares of the passes."""
    lines = []
    for key, result in results.items():
        for name in ("confidence", "entropy"):
            row = row_of(result, name)
            if row is not None and (total := sum(row["chosen"].values())):
                shares = (f"{plain_name(d)} {n / total:.0%}" for d, n in row["chosen"].items())
                lines.append([key.recipe, key.benchmark, f"{key.temperature:g}", name, ", ".join(shares)])
    return table(["recipe", "benchmark", "temperature", "router", "takes"], lines)


def depth_table(results: Results) -> str:
    """Share of the passes in which at least so many drafted tokens are accepted."""
    lines = []
    for key, result in results.items():
        for name in ("math", "chat", "code", "merged"):
            if (row := row_of(result, name)) is not None:
                passes = row["histogram"]
                reached = [sum(passes[d:]) / sum(passes) for d in range(1, len(passes))]
                shares = [f"{share:.0%}" for share in reached]
                lines.append([key.recipe, key.benchmark, f"{key.temperature:g}", name, " ".join(shares)])
    return table(["recipe", "benchmark", "temperature", "strategy", "accepted at depth 1, 2, ..."], lines)


def averaging_table(results: Results) -> str:
    """What averaging two heads' weights costs, from one head alone (λ = 0) to the other (λ = 1)."""
    lines = [
        [key.recipe, key.benchmark, f"{key.temperature:g}", " and ".join(of), f"{weight:g}", _cell(row)]
        for key, result in results.items()
        for of, weight, row in blends(result)
    ]
    return table(["recipe", "benchmark", "temperature", "heads", "λ of the first", "τ"], lines)


def live_table(live: Results) -> str:
    lines = []
    for key, result in live.items():
        for row in result["rows"]:
            lower, upper = quartiles(row["speed_ratios"])
            lines.append([
                key.recipe, key.benchmark, f"{key.temperature:g}",
                plain_name(row["strategy"]) + ", coupled" * row["coupled"],
                f"{row['speed_ratio_median']:.2f} ({lower:.2f} to {upper:.2f})",
                f"{row['tokens_per_second_median']:.0f}",
                f"{row['acceptance_length']:.2f}", f"{row['draft_ms']:.0f}", f"{row['verify_ms']:.0f}",
                f"{row['nodes_per_pass']:.1f}",
            ])  # fmt: skip
    header = "recipe, benchmark, temperature, strategy, speed, tokens/s, τ, draft ms, verify ms, nodes per pass"
    return table(header.split(", "), lines)


Measured = Iterator[tuple[str, str, float]]  # column, strategy, what was measured on one benchmark


def lengths(results: Results) -> Measured:
    """τ of every strategy with its largest trees."""
    for key, result in results.items():
        for name, coupled in dict.fromkeys((plain_name(r["strategy"]), r["coupled"]) for r in result["rows"]):
            if (row := row_of(result, name, coupled)) is not None:
                column = f"{key.recipe}, T = {key.temperature:g}" + ", coupled" * coupled
                yield column, name, row["acceptance_length"]


def speeds(live: Results) -> Measured:
    for key, result in live.items():
        setting = f"{key.recipe}, T = {key.temperature:g}"
        for row in result["rows"]:
            yield setting + ", coupled" * row["coupled"], plain_name(row["strategy"]), row["speed_ratio_median"]


def means_table(measured: Measured, num_benchmarks: int) -> str:
    """Means over the benchmarks; none of a strategy that was measured on fewer than the others."""
    columns: dict[str, dict[str, list[float]]] = {}
    for column, name, value in measured:
        columns.setdefault(column, {}).setdefault(name, []).append(value)
    cells: dict[str, dict[str, str]] = {}
    for title, column_values in columns.items():
        most = max(map(len, column_values.values()))
        title += f" ({most} of {num_benchmarks} benchmarks)" * (most < num_benchmarks)
        cells[title] = {name: f"{mean(v):.2f}" for name, v in column_values.items() if len(v) == most}
    names = dict.fromkeys(name for column_cells in cells.values() for name in column_cells)
    lines = [[name, *(column_cells.get(name, "") for column_cells in cells.values())] for name in names]
    return table(["strategy", *cells], lines)


def claims_section(found: Sequence[Claim]) -> str:
    """A line for each claim, and what it was judged by to unfold."""
    lines, details = [], []
    for claim in found:
        ratios = [comparison.ratio for comparison in claim.comparisons]
        seen = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        lines.append([claim.statement, claim.verdict, seen])
        details.append(f"**{claim.statement}.**\n\n" + "".join(f"- {c.line()}\n" for c in claim.comparisons))
    folded = "\n".join(text for text, claim in zip(details, found, strict=True) if claim.comparisons)
    return (
        f"{table(['claim', 'verdict', 'ratios'], lines)}\n"
        f"<details>\n<summary>Every ratio with its interval</summary>\n\n{folded}\n</details>\n"
    )
