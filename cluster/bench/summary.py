"""The result as one JSON document: a row for each setting in each cell, and the ratios between settings.

Knows what was measured and which comparisons are made; nothing of how either is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cluster.bench.comparison import Estimate, estimate, geometric_mean, unit_ratios
from cluster.bench.experiment import Cell, Served
from cluster.bench.measures import (
    MEASURES,
    Unit,
    answers_of,
    failures,
    measured,
    server_figures,
    unit_values,
    whole,
)
from cluster.bench.settings import Kind

RATIOS = (
    "tokens_per_second", "tokens_per_second_per_user", "ttft_ms_median", "ttft_ms_p95", "inter_token_ms_median",
    "inter_token_ms_p99",
)  # fmt: skip
BEST = "best fixed"  # the fixed strategy with the highest median of tokens a second in a cell, in hindsight
Row = dict[str, Any]
Runs = Mapping[tuple[Cell, str], Sequence[Served]]  # by cell and setting


class Pair(NamedTuple):
    setting: str
    to: str  # the name of a setting, or `BEST`


def by_cell(done: Iterable[Served]) -> dict[tuple[Cell, str], list[Served]]:
    runs: dict[tuple[Cell, str], list[Served]] = {}
    for served in done:
        runs.setdefault((served.cell, served.setting), []).append(served)
    return runs


def rows(runs: Runs) -> list[Row]:
    """What every setting came to in every cell."""
    return [{**cell._asdict(), "setting": name, **_row(served)} for (cell, name), served in runs.items()]


def _row(served: Sequence[Served]) -> Row:
    rounds = [measured(one) for one in served]
    answers = answers_of(served)
    loops = [loop for one in served for loop in one.loops]
    seconds, good = sum(loop.seconds for loop in loops), whole(answers)
    values = {name: [found[name] for found in rounds if name in found] for name in MEASURES}
    return {
        **{name: _estimated(found) for name, found in values.items() if found},
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "failures": failures(served),
        "refusals": sum(answer.refusals for answer in answers),
        "tokens": sum(answer.tokens for answer in good),
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "tokens_are_chunks": any(answer.tokens_are_chunks for answer in good),
        "client_cpu_share": round(sum(loop.client_cpu_s for loop in loops) / seconds, 4),
        "server": {name: round(value, 4) for name, value in server_figures(served).items()},
    }


def _estimated(values: Sequence[float]) -> Row:
    found = estimate(values)
    return {
        "median": _short(found.value),
        "interval_95": _interval(found),
        "rounds": [_short(value) for value in values],
    }


def pairs(kinds: Mapping[str, Kind]) -> list[Pair]:
    """Which settings are compared: all to plain decoding, adaptive to the best fixed, all of ours to peers."""
    of: dict[Kind, list[str]] = {}
    for name, kind in kinds.items():
        of.setdefault(kind, []).append(name)
    plain, peers = of.get("plain", []), of.get("peer", [])
    ours = [name for name, kind in kinds.items() if kind != "peer"]
    return [
        *(Pair(name, to) for to in plain for name in kinds if name != to),
        *(Pair(name, BEST) for name in of.get("adaptive", []) if of.get("fixed")),
        *(Pair(name, to) for to in peers for name in ours),
    ]


def ratios(runs: Runs, kinds: Mapping[str, Kind]) -> list[Row]:
    """Every pair by every measure, for each number of streams at each temperature, workload by workload."""
    places = dict.fromkeys((cell.temperature, cell.streams) for cell, _ in runs)
    values = {
        (cell, name, measure): unit_values(served, measure)
        for (cell, name), served in runs.items()
        for measure in RATIOS
    }
    found = []
    for temperature, streams in places:
        at = [cell for cell in dict.fromkeys(cell for cell, _ in runs)
              if (cell.temperature, cell.streams) == (temperature, streams)]  # fmt: skip
        for measure in RATIOS:
            for pair in pairs(kinds):
                if (row := _compared(pair, measure, at, runs, values, kinds)) is not None:
                    found.append({"measure": measure, "setting": pair.setting, "to": pair.to,
                                  "temperature": temperature, "streams": streams, **row})  # fmt: skip
    return found


def _compared(
    pair: Pair,
    measure: str,
    cells: Sequence[Cell],
    runs: Runs,
    values: Mapping[tuple[Cell, str, str], Mapping[Unit, float]],
    kinds: Mapping[str, Kind],
) -> Row | None:
    """None where the two have nothing in common."""
    workloads: dict[str, Row] = {}
    units: list[list[float]] = []
    for cell in cells:
        to = best_fixed(cell, runs, kinds) if pair.to == BEST else pair.to
        shared = unit_ratios(
            values.get((cell, pair.setting, measure), {}), values.get((cell, to or "", measure), {})
        )
        if shared:
            found = estimate(shared)
            workloads[cell.workload] = {
                "median": _short(found.value), "interval_95": _interval(found), "units": len(shared),
                **({"to": to} if pair.to == BEST else {}),
            }  # fmt: skip
            if pair.to == BEST and (lost := regret(cell, pair.setting, measure, values, kinds)) is not None:
                workloads[cell.workload]["regret"] = _short(lost)
            units.append(shared)
    if not units:
        return None
    mean = geometric_mean(units)
    return {
        "workloads": workloads,
        "geometric_mean": {"value": _short(mean.value), "interval_95": _interval(mean)},
    }


def best_fixed(cell: Cell, runs: Runs, kinds: Mapping[str, Kind]) -> str | None:
    """The fixed strategy that made the most tokens a second in this cell; plain decoding is none."""
    speeds: dict[str, float] = {}
    for name in (name for name, kind in kinds.items() if kind == "fixed"):
        found = [v["tokens_per_second"] for one in runs.get((cell, name), ()) if (v := measured(one))]
        if found:
            speeds[name] = estimate(found).value
    return max(speeds, key=lambda name: speeds[name]) if speeds else None


def regret(
    cell: Cell,
    setting: str,
    measure: str,
    values: Mapping[tuple[Cell, str, str], Mapping[Unit, float]],
    kinds: Mapping[str, Kind],
) -> float | None:
    """The share that is lost to the fixed strategy that was best for each question, in hindsight, on average.

    An upper bound: the best of several noisy measurements is too good. None where questions are not told apart.
    """
    fixed = [values.get((cell, name, measure), {}) for name, kind in kinds.items() if kind == "fixed"]
    lost = []
    for unit, speed in values.get((cell, setting, measure), {}).items():
        others = [of[unit] for of in fixed if unit in of]
        if unit[1] and others:
            lost.append(1.0 - speed / max(others))
    return sum(lost) / len(lost) if lost else None


def _interval(found: Estimate) -> list[float]:
    return [_short(found.low), _short(found.high)]


def _short(value: float) -> float:
    """With five digits that count."""
    return float(f"{value:.5g}")
