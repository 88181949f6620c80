"""Plots of a document, as SVG: speed and waiting by the number of streams. Knows documents alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench import tables
from cluster.bench.tables import Document

try:
    import matplotlib
except ImportError as error:
    raise ValueError("plots need matplotlib: pip install 'taps-cluster[study]'") from error
matplotlib.use("Agg")
import matplotlib.pyplot as plt

_KNOWN = {"off": "#8a8f98", "adaptive": "#c44e52", "merged": "#7a4fa3"}
_OTHERS = ("#3b6fb6", "#d1783c", "#4c9a6a", "#b59b2b", "#5aa7a7", "#a0522d", "#d07aa6", "#333333")
_DRAWN = {
    "tokens_per_second": ("speed", "tokens a second"),
    "ttft_ms_p95": ("first-token", "time to first token, ms, 95th percentile"),
    "inter_token_ms_p99": ("between-chunks", "time between chunks, ms, 99th percentile"),
}


def draw_all(stem: str, document: Document, out: Path) -> dict[str, str]:
    """Captions, and the files drawn to `out`. Args: stem: what the files' names begin with."""
    drawn: dict[str, str] = {}
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
             "svg.hashsalt": "taps", "figure.constrained_layout.use": True}  # fmt: skip
    with plt.rc_context(style):
        for temperature in dict.fromkeys(temperature for temperature, _ in tables.places(document)):
            for measure, (short, label) in _DRAWN.items():
                told = [r for r in document["rows"] if r["temperature"] == temperature and measure in r]
                if not told:
                    continue
                figure = _lines(told, measure, _colours(document), label)
                path = out / f"{stem}-{short}-t{temperature:g}.svg"
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                drawn[f"{label}, temperature {temperature:g}"] = path.name
    return drawn


def _lines(told: Sequence[Document], measure: str, colours: Mapping[str, str], label: str) -> Any:
    """A panel for each workload, a line for each setting, over the number of streams."""
    workloads = list(dict.fromkeys(row["workload"] for row in told))
    figure, axes = plt.subplots(1, len(workloads), figsize=(3.2 * len(workloads), 3), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        rows = [row for row in told if row["workload"] == workload]
        for name, colour in colours.items():
            points = sorted(
                ((row["streams"], row[measure]) for row in rows if row["setting"] == name), key=lambda p: p[0]
            )
            if points:
                medians = [found["median"] for _, found in points]
                low, high = zip(*(found["interval_95"] for _, found in points), strict=True)
                spread = [[m - edge for m, edge in zip(medians, low, strict=True)],
                          [edge - m for m, edge in zip(medians, high, strict=True)]]  # fmt: skip
                axis.errorbar([streams for streams, _ in points], medians, yerr=spread, marker="o",
                              markersize=3, capsize=2, color=colour, label=name)  # fmt: skip
        counts = sorted({row["streams"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, map(str, counts))
        axis.set_ylim(bottom=0)
        axis.set_title(workload)
        axis.set_xlabel("streams")
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(frameon=False)
    return figure


def _colours(document: Document) -> dict[str, str]:
    """By setting, the same in every plot."""
    others = [name for name in document["settings"] if name not in _KNOWN]
    found = _KNOWN | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}
    return {name: found[name] for name in document["settings"]}
