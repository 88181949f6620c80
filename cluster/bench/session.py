"""One run of the benchmark, from servers' addresses to the document. Knows the parts and their order.

Says what it does on standard output, where the caller puts the document last.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from cluster.bench.experiment import Cell, Plan, cells, run
from cluster.bench.measures import MEASURES
from cluster.bench.reuse import measure_reuse
from cluster.bench.settings import (
    PLAIN,
    Contender,
    Server,
    Setting,
    Unmeasurable,
    contenders,
    own_setting,
    own_settings,
    server_at,
)
from cluster.bench.streams import Json
from cluster.bench.summary import by_cell, ratios, rows
from cluster.bench.tables import place_name
from cluster.bench.workloads import Workloads
from taps.evaluation.questions import digest
from taps.provenance import made_with


@dataclass(frozen=True)
class Wanted:
    """What is to be measured."""

    url: str
    strategies: tuple[str, ...]
    own: Mapping[str, Json]  # more ways to ask our server: `taps` by name
    peers: tuple[Setting, ...]
    plan: Plan
    reuse: bool
    timeout_s: float


async def measure(wanted: Wanted, workloads: Workloads) -> Json:
    """The document; when cancelled or sent SIGTERM, of what was done until then. Raises `Unmeasurable`."""
    if (task := asyncio.current_task()) is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    made, started = made_with(), datetime.now(UTC)
    server = await _ours(wanted.url)
    settings, models = await _settings(wanted, server)
    found, left_out = await contenders(settings, models, wanted.timeout_s)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", flush=True)
    try:
        done = await run(found, workloads, wanted.plan, _Progress(wanted.plan, workloads, len(found)).say)
        counts = Counter((served.setting, served.cell) for served in done)
        rounds_done = min(counts[c.setting.name, cell] for c in found for cell in cells(wanted.plan, workloads))
        is_whole = rounds_done == wanted.plan.rounds
        if not is_whole:
            print(f"ended early, with {rounds_done} of {wanted.plan.rounds} rounds whole", flush=True)
        reused = await _reuse(found, workloads, wanted) if wanted.reuse and is_whole else []
    finally:
        for contender in found:
            await contender.client.close()
    runs, kinds = by_cell(done), {contender.setting.name: contender.setting.kind for contender in found}
    return {
        "benchmark": "cluster.bench", "made_with": made, "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds()),
        "server": {"url": wanted.url, "model": server.model, **server.health},
        "plan": {**asdict(wanted.plan), "rounds_done": rounds_done},
        "settings": {
            c.setting.name: {"kind": c.setting.kind, "url": c.setting.url, "model": models[c.setting.name],
                             "body": c.setting.body}
            for c in found
        },
        "left_out": left_out,
        "workloads": {name: {"questions": len(of), "sha256": digest(of)} for name, of in workloads.items()},
        "measures": MEASURES, "rows": rows(runs), "ratios": ratios(runs, kinds), "reuse": reused,
    }  # fmt: skip


async def _ours(url: str) -> Server:
    try:
        server = await server_at(url)
    except httpx.HTTPError as error:
        raise Unmeasurable(f"no server at {url}; run `make serve` first, or name another with --url") from error
    if not server.is_ours:
        raise Unmeasurable(f"the server at {url} is not one of ours; name ours with --url, others with --peer")
    return server


async def _settings(wanted: Wanted, server: Server) -> tuple[list[Setting], dict[str, str]]:
    """All settings, and the model each asks for. Raises `Unmeasurable`."""
    drafters = server.health.get("drafters", [])
    if not drafters and set(wanted.strategies) != {PLAIN}:
        raise Unmeasurable(
            f"no specialist is up at {wanted.url}, so that nothing would be drafted; wait until /health names "
            f"them, or measure --strategies {PLAIN}"
        )
    ours = own_settings(wanted.url, wanted.strategies, drafters)
    ours += [own_setting(name, wanted.url, taps) for name, taps in wanted.own.items()]
    settings = [*ours, *wanted.peers]
    if twice := [n for n, count in Counter(s.name for s in settings).items() if count > 1]:
        raise Unmeasurable(f"two settings are called {twice[0]}; give one another name")
    if sum(setting.kind == "plain" for setting in ours) != 1:
        raise Unmeasurable(f"one setting has to be plain decoding, which others are compared to: {PLAIN}")
    models = {setting.name: server.model for setting in ours}
    for peer in wanted.peers:
        try:
            models[peer.name] = peer.body.get("model") or (await server_at(peer.url, peer.headers)).model
        except httpx.HTTPError as error:
            raise Unmeasurable(f"no server for {peer.name} at {peer.url}: {type(error).__name__}") from error
    return settings, models


async def _reuse(found: Sequence[Contender], workloads: Workloads, wanted: Wanted) -> list[dict[str, Any]]:
    """Of one setting a server: what is found again does not depend on the strategy."""
    servers = {contender.setting.url: contender for contender in reversed(found)}
    print("prefixes found again:", flush=True)
    return await measure_reuse(
        [*reversed(servers.values())], workloads, wanted.plan, lambda name, what: print(f"  {name}, {what}")
    )


class _Progress:
    """Says how far it is, a line for each cell and round."""

    def __init__(self, plan: Plan, workloads: Workloads, settings: int) -> None:
        per_workload = sum(map(plan.num_requests, plan.streams)) * len(plan.temperatures) * plan.rounds
        self._all = len(workloads) * len(plan.streams) * len(plan.temperatures) * plan.rounds
        self._done = 0
        self._started = asyncio.get_running_loop().time()
        print(f"{settings} settings, {len(workloads) * per_workload} requests in each", flush=True)

    def say(self, cell: Cell, number: int) -> None:
        self._done += 1
        seconds = asyncio.get_running_loop().time() - self._started
        print(
            f"{self._done} of {self._all}, {seconds:.0f} s: round {number + 1}, {cell.workload}, "
            f"{place_name((cell.temperature, cell.streams))}",
            flush=True,
        )
