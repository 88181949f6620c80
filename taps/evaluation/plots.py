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
Plots = dict[str, dict[str, str]]  # subject -> recipe and temperature -> file name
_ACCEPTED, _REJECTED = "#4c9a6a", "#c44e52"


def draw_all(results: Results, out: Path) -> Plots:
    """Draw every plot that the results allow."""
    drawn: Plots = {}

    def add(subject: str, where: str, stem: str, figure: Any) -> None:
        path = out / f"{subject}-{stem}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        drawn.setdefault(subject, {})[where] = path.name

    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "svg.hashsalt": "taps", "figure.constrained_layout.use": True}):  # fmt: skip
        for recipe, temperature in dict.fromkeys((k.recipe, k.temperature) for k in results):
            chosen = {k: r for k, r in results.items() if (k.recipe, k.temperature) == (recipe, temperature)}
            where, stem = f"{recipe}, temperature {temperature:g}", f"{recipe}-t{temperature:g}"
            add("acceptance", where, stem, acceptance_bars(chosen))
            add("depth", where, stem, _depths(chosen))
            if any(blends(result) for result in chosen.values()):
                add("averaging", where, stem, _averages(chosen))
            add("calibration", where, stem, _calibration(chosen))
            add("confidence", where, stem, _outcomes(chosen, "confidence", 1.0))
            add("entropy", where, stem, _outcomes(chosen, "entropy", 8.0))
    return drawn


def _panels(results: Results, height: float = 3.0) -> tuple[Any, list[Any]]:
    """One panel for each benchmark, side by side."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(3.6 * len(results), height), squeeze=False, sharey=True
    )
    for axis, key in zip(axes[0], results, strict=True):
        axis.set_title(key.benchmark)
    return figure, list(axes[0])


def acceptance_bars(results: Results) -> Any:
    """Acceptance lengths with their intervals; the lighter bar behind is with coupled drafting."""
    figure, axes = _panels(results, 3.6)
    for axis, result in zip(axes, results.values(), strict=True):
        there = [name for name in _BAR_ROWS if row_of(result, name) is not None]
        for coupled, alpha in ((True, 0.4), (False, 1.0)):
            for place, name in enumerate(there):
                if (row := row_of(result, name, coupled)) is not None:
                    length, (low, high) = row["acceptance_length"], row["interval_95"]
                    axis.bar(place, length, color=_COLOURS.get(name, _GREY), alpha=alpha,
                             yerr=[[length - low], [high - length]], capsize=2)  # fmt: skip
        axis.set_xticks(range(len(there)), there, rotation=60, ha="right")
    axes[0].set_ylim(1)
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
    axes[0].set_ylim(1)
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
