"""What a cluster of so many verifiers needs in drafters and routers, and what gives way first, on paper.

    python -m cluster.scaling docs/results/service-times.json

A paper model: every session goes round and round from the verifier to its drafter and back (a closed network of
queues, in the fluid limit), replicas serve all that waits in one batch, and none is meant to be busier than
`_BUSY` of the time, so that waiting stays short. Knows numbers; nothing of what is served.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from taps.engine.costs import StepCosts

_BUSY = 0.7  # of the time


@dataclass(frozen=True)
class ServiceTimes:
    """Measured, each on cores or a device of its own."""

    pass_s: Mapping[int, float]  # of the target, by rows
    draft_s: Mapping[int, float]  # of a specialist, by sessions
    hop_s: float  # from a verdict to the next question, without the draft
    router_plain_s: float  # of a router's one core, for a token of plain decoding
    router_drafted_s: float  # for a step with a draft


@dataclass(frozen=True)
class Workload:
    """What sessions do."""

    sessions: int  # of each verifier
    drafted: float  # the share of the sessions that draft
    nodes: float  # of a drafted tree, that are checked
    accepted: float  # tokens of a drafted step


@dataclass(frozen=True)
class Needs:
    """Of one cluster."""

    verifiers: int
    tokens_per_s: float
    drafters: int  # replicas, of all specialists together
    routers: int
    links: int  # streams between routers and replicas
    first: str  # what is the busiest with one drafter and one router


def needs(times: ServiceTimes, load: Workload, verifiers: int) -> Needs:
    """What a number of verifiers need to be kept at work."""
    passes, drafts = StepCosts(times.pass_s), StepCosts(times.draft_s)
    drafting = load.sessions * load.drafted
    rows = load.sessions + drafting * load.nodes
    # A verifier's sessions share a pass, so those that draft set the pace; none waits where nobody drafts.
    round_s = passes.seconds(rows) + (times.hop_s + drafts.seconds(drafting) if drafting else 0.0)
    rounds = verifiers / round_s
    tokens = load.sessions - drafting + drafting * load.accepted
    batch = max(times.draft_s)
    drafter_s = rounds * drafting * drafts.seconds(batch) / batch
    router_s = rounds * ((load.sessions - drafting) * times.router_plain_s + drafting * times.router_drafted_s)
    busy = {"verifier": passes.seconds(rows) / round_s, "drafter": drafter_s, "router": router_s}
    drafters, routers = (math.ceil(busy[name] / _BUSY) for name in ("drafter", "router"))
    first = max(busy, key=lambda name: busy[name])
    return Needs(verifiers, rounds * tokens, drafters, routers, routers * (verifiers + drafters), first)


def table(times: ServiceTimes, loads: Mapping[str, Workload], verifiers: Sequence[int]) -> str:
    """Markdown, a line for each cluster."""
    lines = [
        "| load | verifiers | tokens/s | drafter replicas | routers | links | busiest with one of each |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, load in loads.items():
        for number in verifiers:
            found = needs(times, load, number)
            cells = [name, number, f"{found.tokens_per_s:,.0f}", found.drafters, found.routers, found.links]
            lines.append("| " + " | ".join(map(str, [*cells, found.first])) + " |")
    return "\n".join(lines)


def read(path: Path) -> tuple[dict[str, ServiceTimes], dict[str, Workload]]:
    """Machines and loads of a file. Raises `ValueError` where one lacks something."""
    try:
        said = json.loads(path.read_text())
        machines = {
            name: ServiceTimes(
                {int(rows): seconds for rows, seconds in one["pass_s"].items()},
                {int(sessions): seconds for sessions, seconds in one["draft_s"].items()},
                one["hop_s"],
                one["router_plain_s"],
                one["router_drafted_s"],
            )
            for name, one in said["machines"].items()
        }
        return machines, {name: Workload(**one) for name, one in said["loads"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of service times and loads: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("times", type=Path, help="service times and loads, as docs/results/service-times.json")
    parser.add_argument("--verifiers", default="1,8,64", help="default: 1,8,64")
    args = parser.parse_args(argv)
    try:
        machines, loads = read(args.times)
        numbers = [int(number) for number in args.verifiers.split(",")]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, times in machines.items():
        print(f"{name}\n\n{table(times, loads, numbers)}\n")


if __name__ == "__main__":
    main()
