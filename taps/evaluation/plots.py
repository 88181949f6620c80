"""The study's plots, as SVG. Knows results; nothing of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taps.evaluation.results import InvalidResults, Results, blends, plain_name, row_of

try:
    import matplotlib
except ImportError as error:
    raise InvalidResults("plots need matplotlib: pip install 'taps-cluster[study]'") from error
matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = {"math": "#3b6fb6", "chat": "#d1783c", "code": "#4c9a6a", "merged": "#7a4fa3"}
_GREY = "#8a8f98"
_BAR_ROWS = (
    "math", "chat", "code", "mixed-half", "mixed-full", "averaged", "entropy", "confidence", "merged",
    "concatenated", "oracle",
)  # fmt: skip
_ACCEPTED, _REJECTED = "#4c9a6a", "#c44e52"


def draw_all(results: Results, out: Path) -> dict[str, str]:
    """Draw every plot that the results allow. Caption -> file name."""
    drawn: dict[str, str] = {}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "svg.hashsalt": "taps", "figure.constrained_layout.use": True}):  # fmt: skip
        for method, temperature in dict.fromkeys((k.method, k.temperature) for k in results):
            chosen = {k: r for k, r in results.items() if (k.method, k.temperature) == (method, temperature)}
            where = f"{method}, temperature {temperature:g}"
            stem = f"{method}-t{temperature:g}"
            drawn[f"Acceptance length, {where}"] = _save(_bars(chosen), out / f"acceptance-{stem}.svg")
            drawn[f"Accepted by depth, {where}"] = _save(_depths(chosen), out / f"depth-{stem}.svg")
            if any(blends(result) for result in chosen.values()):
                drawn[f"Averaged weights, {where}"] = _save(_averages(chosen), out / f"averaging-{stem}.svg")
            drawn[f"Calibration, {where}"] = _save(_calibration(chosen), out / f"calibration-{stem}.svg")
            drawn[f"Confidence of accepted and rejected tokens, {where}"] = _save(
                _outcomes(chosen, "confidence", 1.0), out / f"confidence-{stem}.svg"
            )
            drawn[f"Entropy where the first token is accepted and where it is rejected, nats, {where}"] = _save(
                _outcomes(chosen, "entropy", 8.0), out / f"entropy-{stem}.svg"
            )
    return drawn


def _save(figure: Any, path: Path) -> str:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path.name


def _panels(results: Results, height: float = 3.0) -> tuple[Any, list[Any]]:
    """One panel for each benchmark, side by side."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(3.6 * len(results), height), squeeze=False, sharey=True
    )
    for axis, key in zip(axes[0], results, strict=True):
        axis.set_title(key.benchmark)
    return figure, list(axes[0])


def _bars(results: Results) -> Any:
    figure, axes = _panels(results, 3.6)
    for axis, result in zip(axes, results.values(), strict=True):
        rows = [(name, row_of(result, name)) for name in _BAR_ROWS]
        there = [(name, row) for name, row in rows if row is not None]
        for place, (name, row) in enumerate(there):
            length, (low, high) = row["acceptance_length"], row["interval_95"]
            colour = _COLOURS.get(name, _GREY)
            axis.bar(place, length, color=colour, yerr=[[length - low], [high - length]], capsize=2)
        axis.set_xticks(range(len(there)), [name for name, _ in there], rotation=60, ha="right")
        axis.set_ylim(1)
    axes[0].set_ylabel("tokens per verify pass")
    return figure


def _depths(results: Results) -> Any:
    figure, axes = _panels(results)
    for axis, result in zip(axes, results.values(), strict=True):
        for name, colour in _COLOURS.items():
            if (row := row_of(result, name)) is not None:
                passes = row["histogram"]
                reached = [sum(passes[d:]) / sum(passes) for d in range(len(passes))]
                axis.plot(range(len(passes)), reached, marker="o", markersize=3, color=colour, label=name)
        axis.set_xlabel("drafted tokens accepted, at least")
    axes[0].set_ylabel("share of the passes")
    axes[-1].legend(frameon=False)
    return figure


def _averages(results: Results) -> Any:
    figure, axes = _panels(results)
    for axis, result in zip(axes, results.values(), strict=True):
        found = blends(result)
        for heads in dict.fromkeys(blend.heads for blend in found):
            line = [blend for blend in found if blend.heads == heads]
            lengths = [blend.row["acceptance_length"] for blend in line]
            low, high = zip(*(blend.row["interval_95"] for blend in line), strict=True)
            spread = [[t - edge for t, edge in zip(lengths, low, strict=True)],
                      [edge - t for t, edge in zip(lengths, high, strict=True)]]  # fmt: skip
            axis.errorbar([blend.weight for blend in line], lengths, yerr=spread, marker="o", markersize=3,
                          capsize=2, label=" and ".join(heads))  # fmt: skip
        axis.set_xlabel("λ, the first head's weight")
        axis.set_ylim(1)
    axes[0].set_ylabel("tokens per verify pass")
    axes[-1].legend(frameon=False)
    return figure


def _calibration(results: Results) -> Any:
    figure, axes = _panels(results)
    for axis, result in zip(axes, results.values(), strict=True):
        axis.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8)
        for head, analysis in result["analysis"].items():
            if (name := plain_name(head)) in _COLOURS:
                bins = zip(analysis["probability"], analysis["hits"], analysis["nodes"], strict=True)
                points = [(p / n, hits / n) for p, hits, n in bins if n >= 20]
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, color=_COLOURS[name], label=name
                )
        axis.set_xlabel("path probability drafted")
    axes[0].set_ylabel("share on the target's path")
    axes[-1].legend(frameon=False)
    return figure


def _outcomes(results: Results, what: str, width: float) -> Any:
    """Densities over all heads that are drawn: what accepted first tokens look like, and rejected ones."""
    figure, axes = _panels(results)
    for axis, result in zip(axes, results.values(), strict=True):
        for outcome, colour in (("accepted", _ACCEPTED), ("rejected", _REJECTED)):
            bins = [a[what][outcome] for head, a in result["analysis"].items() if plain_name(head) in _COLOURS]
            sums = [sum(column) for column in zip(*bins, strict=True)]
            total, step = max(sum(sums), 1), width / max(len(sums), 1)
            axis.stairs([n / total for n in sums], [i * step for i in range(len(sums) + 1)], color=colour,
                        fill=True, alpha=0.45, label=outcome)  # fmt: skip
        axis.set_xlabel(what)
    axes[0].set_ylabel("share")
    axes[-1].legend(frameon=False)
    return figure
