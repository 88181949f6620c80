"""Documents to Markdown: the README's section, and a page with every table. Nothing in them is written by hand.

Knows documents and files; nothing of how anything was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster.bench import tables
from cluster.bench.measures import MEASURES
from cluster.bench.summary import BEST
from cluster.bench.tables import Document

BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
_COMPARED = {
    "tokens_per_second": "tokens a second",
    "ttft_ms_median": "time to first token, median",
    "ttft_ms_p95": "time to first token, 95th percentile",
    "inter_token_ms_p99": "time between chunks, 99th percentile",
}
_METHOD = (
    "Closed loops of streams ask over HTTP, every request with a `cache_salt` of its own. Settings take turns; "
    "ratios are taken between neighbours, medians of them per workload, then geometric means over workloads, "
    "with 95 % bootstrap intervals where there is more than one unit.\n"
)
Documents = Mapping[str, Document]  # by the stem of the file
Plots = dict[str, dict[str, str]]  # stem of the file -> caption -> file of the plot


def load_documents(paths: Sequence[Path]) -> dict[str, Document]:
    """Raises `ValueError` of a file that holds no document, and `OSError`."""
    found: dict[str, Document] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"two results are called {path.stem}; rename one")
        found[path.stem] = _document(path)
    return found


def _document(path: Path) -> Document:
    """Of a result, or of the output of a run, whose last line it is."""
    text = path.read_text().strip()
    for candidate in (text, text[text.rfind("\n") + 1 :]):
        try:
            document = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(document, dict) and document.get("benchmark") == "cluster.bench":
            return document
    raise ValueError(f"{path} is not a result of `python -m cluster.bench`; make one with --out")


def write_page(documents: Documents, out: Path) -> Plots:
    """Write README.md and its plots to `out`. Raises `ValueError` without matplotlib, and `OSError`."""
    from cluster.bench.plots import draw_all

    out.mkdir(parents=True, exist_ok=True)
    plots = {name: draw_all(name, document, out) for name, document in documents.items()}
    title = "# Performance\n\nMade by `python -m cluster.bench report`; nothing here is written by hand.\n"
    parts = [title, _METHOD]
    for name, document in documents.items():
        parts += [f"## {name}\n\n{section(document)}", _shown(plots[name], ""), *_every_cell(document)]
    meanings = "".join(f"- `{name}`: {what}\n" for name, what in MEASURES.items() if what)
    (out / "README.md").write_text("\n".join([*parts, f"## What is measured\n\n{meanings}"]))
    return plots


def write_section(documents: Documents, readme: Path, out: Path | None, plots: Plots) -> None:
    """Replace what stands between the two marks. Args: out: where page and plots are, if they are anywhere.

    Raises `ValueError` where the marks are not there, and `OSError`.
    """
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no lines {BEGIN} and {END}; put them where the section should be")
    parts = [_METHOD]
    where = "" if out is None else f"{Path(os.path.relpath(out, readme.parent)).as_posix()}/"
    for name, document in documents.items():
        speeds = {
            caption: file for caption, file in plots.get(name, {}).items() if "tokens a second" in caption
        }
        parts += [section(document), _shown(speeds, where)]  # the page shows all
    if out is not None:
        parts.append(f"[{where}README.md]({where}README.md) has every figure.\n")
    text = "\n".join(part for part in parts if part)
    readme.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def section(document: Document) -> str:
    """What a reader wants to know first."""
    parts = [_how(document)]
    for temperature in dict.fromkeys(temperature for temperature, _ in tables.places(document)):
        parts += _speeds(document, temperature)
    if found := tables.reuse_table(document):
        parts.append(f"Prefixes found again, answers to one stream:\n\n{found}")
    return "\n".join([*parts, *(f"- {warning}" for warning in tables.warnings(document))])


def _how(document: Document) -> str:
    made, plan, day = document["made_with"], document["plan"], document["started"][:10]
    number = plan["rounds_done"]
    rounds = f"{number} round" + "s" * (number != 1) if number else "a round cut short"
    kernel = document["server"].get("numerics", "").partition(" ")[0]
    machine = ", ".join(filter(None, [made["machine"], kernel]))
    return (
        f"**{machine}**: {document['server']['model']} on {made['cores']} cores, commit {made['commit']}, "
        f"{day}; {', '.join(document['workloads'])}; {rounds} of {plan['questions']} questions or more "
        f"a workload, answers of at most {plan['max_tokens']} tokens.{_named(document)}\n"
    )


def _named(document: Document) -> str:
    """What settings ask for whose names do not say it."""
    found = []
    for name, setting in document["settings"].items():
        asked = (setting.get("body") or {}).get("taps") or {}
        drafters = asked.get("drafters")
        if drafters and setting["kind"] != "peer":
            found.append(f"`{name}` is {asked.get('strategy', '')} with {', '.join(drafters)}")
    return f" {'; '.join(found)}." if found else ""


def _speeds(document: Document, temperature: float) -> Iterator[str]:
    """Ratios at one temperature: to plain decoding, to the best fixed strategy, and to the peers."""
    plain = tables.plain_name(document)
    if found := tables.means_table(document, "tokens_per_second", plain, temperature):
        yield f"Tokens a second ÷ plain decoding (`{plain}`), temperature {temperature:g}:\n\n{found}"
    if found := tables.workloads_table(document, "tokens_per_second", plain, temperature, 1):
        yield f"One stream, by workload, temperature {temperature:g}:\n\n{found}"
    if found := tables.means_table(document, "tokens_per_second", BEST, temperature):
        yield (
            "Tokens a second ÷ the fixed strategy that turned out best in each cell, temperature "
            f"{temperature:g}:\n\n{found}"
        )
    if found := tables.regrets(document, temperature):
        yield f"Lost to the fixed strategy that was best for each question, one stream: {found}.\n"
    peers = [name for name, setting in document["settings"].items() if setting["kind"] == "peer"]
    if found := tables.peers_table(document, _COMPARED, _headline(document), peers, temperature):
        yield f"Beside other servers, temperature {temperature:g}:\n\n{found}"


def _headline(document: Document) -> str:
    """The setting that is shown beside peers."""
    names = [
        name
        for kind in ("adaptive", "fixed", "plain")
        for name, setting in document["settings"].items()
        if setting["kind"] == kind
    ]
    return names[0] if names else ""


def _every_cell(document: Document) -> Iterator[str]:
    share = max(row["client_cpu_share"] for row in document["rows"])
    yield f"The client took at most {share:.0%} of one core.\n"
    for temperature, streams in tables.places(document):
        for workload in document["workloads"]:
            if found := tables.cell_table(document, temperature, streams, workload):
                yield f"### {workload}, {tables.place_name((temperature, streams))}\n\n{found}"
            if found := tables.server_table(document, temperature, streams, workload):
                yield f"What the server says of it, medians of the answers:\n\n{found}"


def _shown(plots: Mapping[str, str], where: str) -> str:
    return "\n".join(f"![{caption}]({where}{file})\n" for caption, file in plots.items())
