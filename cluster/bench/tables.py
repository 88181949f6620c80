"""Tables of a result, in Markdown that reads well as it is. Knows the document alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.bench.summary import BEST

Document = dict[str, Any]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns are as wide as what is in them; all but the first lean to the right."""
    lines = [header, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = [f"{'-' * width}{':' if i else '-'}" for i, width in enumerate(widths)]
    padded = [
        [
            f" {cell:>{w}} " if i else f" {cell:<{w}} "
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    ruled = [f" {cell}" for cell in rule]
    return "".join(f"|{'|'.join(line)}|\n" for line in [padded[0], ruled, *padded[1:]])


def places(document: Document) -> list[tuple[float, int]]:
    """Temperatures and numbers of streams."""
    return list(dict.fromkeys((row["temperature"], row["streams"]) for row in document["rows"]))


def cell_table(document: Document, temperature: float, streams: int, workload: str) -> str:
    """Everything of one cell, setting by setting."""
    lines = []
    for row in document["rows"]:
        if (row["temperature"], row["streams"], row["workload"]) == (temperature, streams, workload):
            ratio = ratio_row(
                document, "tokens_per_second", row["setting"], plain_name(document), *(temperature, streams)
            )
            found = (ratio or {"workloads": {}})["workloads"].get(workload)
            lines.append([
                row["setting"], _spread(row.get("tokens_per_second")), _ratio(found),
                *(_median(row.get(name)) for name in (
                    "tokens_per_second_per_user", "ttft_ms_median", "ttft_ms_p95", "inter_token_ms_median",
                    "inter_token_ms_p95", "inter_token_ms_p99")),
                _median(row.get("acceptance_length"), 2), _median(row.get("nodes_per_pass")), _failed(row),
            ])  # fmt: skip
    header = (
        "setting", "tokens/s (95 %)", "÷ plain", "per user", "TTFT ms", "p95", "ITL ms", "p95", "p99", "τ",
        "nodes", "failed",
    )  # fmt: skip
    return table(header, lines) if lines else ""


def server_table(document: Document, temperature: float, streams: int, workload: str) -> str:
    """Where the time of a step goes, and what else a server says under `metrics`; empty where none does."""
    rows = [
        row
        for row in document["rows"]
        if (row["temperature"], row["streams"], row["workload"]) == (temperature, streams, workload)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row["server"]))
    lines = [[r["setting"], *(f"{r['server'][n]:g}" if n in r["server"] else "" for n in names)] for r in rows]
    return table(["setting", *names], lines) if names else ""


def plain_name(document: Document) -> str:
    return next((n for n, setting in document["settings"].items() if setting["kind"] == "plain"), "")


def ratio_row(
    document: Document, measure: str, setting: str, to: str, temperature: float, streams: int
) -> Document | None:
    wanted = (measure, setting, to, temperature, streams)
    for row in document["ratios"]:
        if tuple(row[name] for name in ("measure", "setting", "to", "temperature", "streams")) == wanted:
            found: Document = row
            return found
    return None


def means_table(document: Document, measure: str, to: str, temperature: float) -> str:
    """Geometric means over the workloads of the ratios to `to`; empty where nothing was compared to it."""
    at = [place for place in places(document) if place[0] == temperature]
    names = dict.fromkeys(
        row["setting"]
        for row in document["ratios"]
        if (row["measure"], row["to"], row["temperature"]) == (measure, to, temperature)
    )
    lines = []
    for name in names:
        rows = [ratio_row(document, measure, name, to, *place) for place in at]
        lines.append([name, *("" if row is None else _mean(row["geometric_mean"]) for row in rows)])
    header = [streams_name(streams) for _, streams in at]
    return table(["setting", *header], lines) if lines else ""


def peers_table(
    document: Document, measures: Mapping[str, str], setting: str, peers: Sequence[str], temperature: float
) -> str:
    """One setting's ratios to each peer, means over the workloads; empty where it was compared with none.

    Args: measures: what each is called, by name.
    """
    at = [place for place in places(document) if place[0] == temperature]
    lines = []
    for peer in peers:
        for measure, what in measures.items():
            rows = [ratio_row(document, measure, setting, peer, *place) for place in at]
            if any(rows):
                cells = ("" if row is None else _mean(row["geometric_mean"]) for row in rows)
                lines.append([f"{peer}: {what}", *cells])
    header = [streams_name(streams) for _, streams in at]
    return table([f"{setting} ÷ peer", *header], lines) if lines else ""


def workloads_table(document: Document, measure: str, to: str, temperature: float, streams: int) -> str:
    """Ratios to `to`, workload by workload; empty where nothing was compared to it."""
    rows = [
        row
        for row in document["ratios"]
        if (row["measure"], row["to"], row["temperature"], row["streams"])
        == (measure, to, temperature, streams)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row["workloads"]))
    lines = [
        [row["setting"], *(_ratio(row["workloads"].get(name), to == BEST) for name in names),
         _mean(row["geometric_mean"])]
        for row in rows
    ]  # fmt: skip
    return table(["setting", *names, "geometric mean"], lines) if lines else ""


def regrets(document: Document, temperature: float) -> str:
    """Adaptive's regret by workload, where questions were told apart."""
    row = ratio_row(document, "tokens_per_second", "adaptive", BEST, temperature, 1)
    workloads = row["workloads"] if row else {}
    return ", ".join(f"{name} {of['regret']:.0%}" for name, of in workloads.items() if "regret" in of)


def reuse_table(document: Document) -> str:
    lines = [
        [row["setting"], row["kind"].replace("_", " "), f"{row['prompt_tokens']:.0f}",
         f"{row['cached_tokens_warm']:.0f}", f"{row['ttft_ms_cold']:.0f}", f"{row['ttft_ms_warm']:.0f}",
         _mean(row["cold_over_warm"])]
        for row in document["reuse"]
    ]  # fmt: skip
    header = ("setting", "what", "prompt tokens", "found again", "TTFT ms cold", "warm", "cold ÷ warm")
    return table(header, lines) if lines else ""


def place_name(place: tuple[float, int]) -> str:
    temperature, streams = place
    return f"T = {temperature:g}, {streams_name(streams)}"


def streams_name(streams: int) -> str:
    return f"{streams} stream{'s' * (streams > 1)}"


def _median(found: Document | None, digits: int = 1) -> str:
    return "" if found is None else f"{found['median']:.{digits}f}"


def _spread(found: Document | None) -> str:
    if found is None:
        return ""
    low, high = found["interval_95"]
    return f"{found['median']:.1f} ({low:.1f} to {high:.1f})"


def _ratio(found: Document | None, names_other: bool = False) -> str:
    if found is None:
        return ""
    return f"{found['median']:.2f}" + (f" of {found['to']}" if names_other else "")


def _mean(found: Document) -> str:
    """With its interval, where one round has questions to tell apart."""
    low, high = found["interval_95"]
    return f"{found['value']:.2f}" + ("" if low == high else f" ({low:.2f} to {high:.2f})")


def _failed(row: Document) -> str:
    return f"{row['failed']} of {row['requests']}" if row["failed"] else ""


def warnings(document: Document) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    for row in document["rows"]:
        where = f"{row['setting']}, {row['workload']}, {place_name((row['temperature'], row['streams']))}"
        if row["failed"]:
            why = "; ".join(f"{count} times {reason}" for reason, count in row["failures"].items())
            found.append(f"failed: {row['failed']} of {row['requests']} requests of {where}: {why}\n")
        if row["refusals"]:
            found.append(f"refused: {where}: {row['refusals']} times, and sent again\n")
        if row["cached_tokens"]:
            share = row["cached_tokens"] / row["prompt_tokens"]
            found.append(f"not cold: {where}: {share:.0%} of the prompts' tokens were in the server's cache\n")
        if row["tokens_are_chunks"]:
            found.append(f"uncounted: {where}: the server gives no usage, so a chunk counts as one token\n")
    return found
