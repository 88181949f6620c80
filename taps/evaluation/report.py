"""The study's report from committed result files: tables, the paper's claims with verdicts, plots.

Everything it says is computed from the files. Knows results; nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from taps.evaluation.claims import claims
from taps.evaluation.results import Results, blends, load_live, load_results
from taps.evaluation.tables import (
    acceptance_section,
    averaging_table,
    claims_section,
    coupling_table,
    depth_table,
    heads_table,
    lengths,
    live_table,
    means_table,
    routing_table,
    speeds,
)


def write_report(source: Path, out: Path) -> None:
    """Write README.md and its plots to `out` from the result files in `source`. Raises `InvalidResults`."""
    from taps.evaluation.plots import draw_all

    results = load_results(source)
    live = load_live(source)
    out.mkdir(parents=True, exist_ok=True)
    plots = draw_all(results, out)
    (out / "README.md").write_text(report(results, live, plots, source))


def report(results: Results, live: Results, plots: Mapping[str, Mapping[str, str]], source: Path) -> str:
    """The text. Args: plots: subject -> recipe and temperature -> file name."""
    asked = {
        key.benchmark: f"{len(result['rows'][0]['questions'])} of {key.benchmark}"
        for key, result in results.items()
    }
    plan, found = next(iter(results.values()))["plan"], claims(results)

    def drawn(subject: str, caption: str) -> str:
        shown = plots.get(subject, {}).items()
        return "".join(f"{caption}, {where}:\n\n![{caption}, {where}]({name})\n\n" for where, name in shown)

    summary = "## In short\n\nτ, mean of the benchmarks, T the temperature:\n\n"
    summary += means_table(lengths(results), len(asked))
    if live:
        summary += f"\nSpeed, mean of the benchmarks, {_live_setting(live)}:\n\n"
        summary += means_table(speeds(live), len(asked))
    parts = [
        "# Specialists: what they buy\n\n"
        f"Made by `taps report` from the files in `{source}`; nothing here is written by hand.\n\n"
        "The acceptance length τ is the number of tokens per verify pass, the bonus token included, pooled "
        f"over the questions of a benchmark: {', '.join(asked.values())}, at most {plan['new_tokens']} new "
        "tokens a turn. Behind it stand 95 % bootstrap intervals over questions. Trees have "
        f"{plan['num_nodes']} nodes, depth {plan['depth']} and top-k {plan['top_k']} where no other size is "
        "given; `concatenated` keeps all nodes of all trees, and accepts what an `oracle` would, that takes in "
        "each pass the tree that turns out best. Speed is relative to plain decoding in the same run. The "
        "paper reports the mean of the questions' own τ, folded in below each table here; its figures are 1 to "
        "4 % high, because its script counts steps from zero.\n",
        summary,
        "## The heads\n\n" + heads_table(results, live),
        "## The paper's claims\n\n" + claims_section([claim for claim in found if claim.by_paper]),
        "## Ours\n\n" + claims_section([claim for claim in found if not claim.by_paper]),
        "## Acceptance length\n\n" + drawn("acceptance", "τ (lighter: coupled)"),
    ]
    for recipe, temperature in dict.fromkeys((k.recipe, k.temperature) for k in results):
        parts.append(f"### {recipe}, temperature {temperature:g}\n")
        for coupled in (False, True)[: 1 + bool(temperature)]:
            parts.append(
                "Coupled drafting:\n" * coupled + acceptance_section(results, recipe, temperature, coupled)
            )
    if gains := coupling_table(results):
        parts.append("## Coupled drafting\n\nDrafting with the noise the target samples with.\n\n" + gains)
    parts.append("## Which drafter the routers take\n\nShares of the passes.\n\n" + routing_table(results))
    parts.append("## Depth\n\n" + depth_table(results) + "\n" + drawn("depth", "Accepted by depth"))
    if any(blends(result) for result in results.values()):
        averaged = averaging_table(results) + "\n" + drawn("averaging", "τ of averaged weights")
        parts.append("## Averaging weights\n\n" + averaged)
    parts.append(
        "## How sure drafters are, and how right\n\n"
        + drawn("calibration", "Calibration of path probabilities")
        + drawn("confidence", "Confidence of accepted and rejected tokens")
        + drawn("entropy", "Entropy, in nats, where the first token is accepted and where it is rejected")
    )
    if live:
        parts.append(
            "## Speed\n\nTokens a second as a ratio to plain decoding in the same run: median over questions, "
            f"and quartiles; {_live_setting(live)}.\n\n" + live_table(live)
        )
    return "\n".join(parts)


def _live_setting(live: Results) -> str:
    """What speeds were measured with."""
    result = next(iter(live.values()))
    plan, threads, device = result["plan"], result["threads"], result["made_with"]["device"]
    return (
        f"one stream on {threads} threads ({device}), trees of {plan['num_nodes']} nodes, depth "
        f"{plan['depth']} and top-k {plan['top_k']}"
    )
