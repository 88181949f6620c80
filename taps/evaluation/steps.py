"""Milliseconds a step of the engine takes in this process, each beside its floor and a plain step.

Cases take turns in rounds, so that what else the machine does falls on all of them. Knows which steps are
timed and what is told of them; nothing of how a step is made or what a floor counts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from taps.drafting.drafter import RESERVED_ROWS, Ask
from taps.drafting.eagle import EagleDrafter
from taps.engine.target import Target
from taps.engine.threads import computing_with
from taps.evaluation.floors import (
    Cost,
    Rates,
    TargetSize,
    floor_of,
    measured_rates,
    num_weights,
    target_size,
)
from taps.evaluation.statistics import quartiles
from taps.evaluation.step_work import (
    DRIFT,
    Drafting,
    Prefilling,
    Text,
    Verifying,
    decide,
    last_logits,
    positions_for,
    timed,
    write_texts,
)
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import load_head
from taps.models.draft_head import DraftHead
from taps.models.embedded import target_path
from taps.models.pretrained import load_model
from taps.provenance import heads_made, made_with, unlike_names
from taps.shaping import SamplingParams

TOGETHER = 16  # sessions of the largest steps
_SHAPES = ((1, 1), (1, 8), (1, 16), (1, 60), (4, 1), (16, 1), (16, 4), (16, 8))  # sessions x rows of each
_USUAL, _LONG = 200, ((1, 8, 1500), (16, 1, 600))
_PREFILL_ROWS, _PREFILL_AT = 256, (0, 1024)
_PLAIN = ("verify", "", 1, 1)
_QUIET = 0.5  # a load above it is somebody else's


@dataclass(frozen=True)
class StepsPlan:
    """What is timed, and how."""

    repeats: int = 15
    contexts: tuple[int, ...] | None = None  # every shape at each of these; None is the usual choice
    dtype: str = "bfloat16"
    threads: int | None = None  # None leaves it to torch


class Case(NamedTuple):
    """One kind of step."""

    kind: str  # verify, prefill, draft or decide
    detail: str  # which head or temperature
    sessions: int
    rows: int  # of each session; of a draft: nodes
    context: int  # positions committed in each session, up to `DRIFT` more

    @property
    def name(self) -> str:
        what = f"{self.kind} {self.detail}".strip()
        return f"{what}: {self.sessions} x {self.rows} at {self.context}"

    @property
    def tree_nodes(self) -> int:
        return self.sessions * (self.rows - 1)


class Timing(NamedTuple):
    ms: float
    cost: Cost


class Work(NamedTuple):
    """A case, the rates its floor is computed with, and one run of it."""

    case: Case
    rates: Rates
    run: Callable[[], Timing]


def target_cases(contexts: Sequence[int] | None) -> list[Case]:
    """Verify and prefill steps. Args: contexts: as in the plan."""
    verify = [(*shape, context) for context in contexts or (_USUAL,) for shape in _SHAPES]
    verify += () if contexts else _LONG
    prefill = [Case("prefill", "", 1, _PREFILL_ROWS, context) for context in _PREFILL_AT]
    return [*(Case("verify", "", *numbers) for numbers in verify), *prefill]


def fits(case: Case, max_positions: int) -> bool:
    if case.kind == "prefill":
        return case.context + case.rows < max_positions
    return positions_for(case.context, case.tree_nodes) <= max_positions


def measure(target: str, heads: Sequence[Path], plan: StepsPlan) -> dict[str, Any]:
    """Every step's milliseconds, floor and ratios, and where they come from."""
    names, device = unlike_names(heads), "cuda" if torch.cuda.is_available() else "cpu"
    load = [round(x, 2) for x in os.getloadavg()]  # before our own is in it
    environment, made = made_with() | {"device": device, "load": load}, heads_made(heads)
    path, dtype = target_path(target), getattr(torch, plan.dtype)
    threads = plan.threads or torch.get_num_threads()
    with computing_with(threads):
        loaded = {
            name: load_head(head, path, dtype).to(device) for name, head in zip(names, heads, strict=True)
        }
        model = load_model(path, dtype, device)
        size = target_size(model)
        engine = Engine(CausalLM(model), size, measured_rates(dtype, device), _lone_rates(dtype, device))
        cases = target_cases(plan.contexts)
        fitting = [case for case in cases if fits(case, engine.model.max_positions)]
        works = _works(engine, loaded, fitting)
        rows = tabulated(in_rounds(works, plan.repeats))
        numerics = _numerics(engine.model)
    return {
        "steps": rows,
        "skipped": [case.name for case in cases if case not in fitting],
        "floor": _floor(engine),
        "provenance": {
            "plan": asdict(plan),
            "target": target,
            "heads": made,
            "made_with": environment,
            "threads": threads,
            "numerics": numerics,
        },
    }


class Engine(NamedTuple):
    """The target and what floors are computed with."""

    model: CausalLM
    size: TargetSize
    rates: Rates
    lone_rates: Rates  # of one thread


def _lone_rates(dtype: torch.dtype, device: str) -> Rates:
    with computing_with(1):
        return measured_rates(dtype, device)


def _numerics(model: CausalLM) -> str:
    target = Target(model, 1)
    target.probe()
    return target.numerics


def _floor(engine: Engine) -> dict[str, Any]:
    """What all floors are computed with."""
    size = engine.size
    return {
        "linear_weights": size.body + size.lm_head,
        "linear_bytes": size.num_bytes,
        "cache_bytes_per_position": size.position_bytes,
        "memory_ms": round(floor_of(Cost(size.num_bytes, 0), engine.rates).ms, 3),
        **_told(engine.rates),
        "one_thread": _told(engine.lone_rates),
    }


def _told(rates: Rates) -> dict[str, float]:
    return {"gb_per_s": round(rates.bytes_per_s / 1e9, 2), "gflop_per_s": round(rates.flops_per_s / 1e9, 1)}


def _works(engine: Engine, heads: Mapping[str, DraftHead], cases: Sequence[Case]) -> list[Work]:
    """Opens all sessions. Raises `ValueError` where the target is too short for any tree."""
    verify = [case for case in cases if case.kind == "verify"]
    if not verify:
        raise ValueError(
            f"no step fits the target's {engine.model.max_positions} positions; name fewer with --contexts"
        )
    context = verify[0].context
    texts = write_texts(engine.model, TOGETHER, context + DRIFT)
    prefill = [case for case in cases if case.kind == "prefill"]
    return [
        *_verifying(engine, texts, verify),
        *(_prefilling(engine, texts[0], case) for case in prefill),
        *(work for name, head in heads.items() for work in _drafting(engine, name, head, texts, context)),
        *_deciding(engine, texts[0], context),
    ]


def _verifying(engine: Engine, texts: Sequence[Text], cases: Sequence[Case]) -> Iterator[Work]:
    for context in dict.fromkeys(case.context for case in cases):
        sharing = [case for case in cases if case.context == context]
        num_sessions, tree_nodes = max(c.sessions for c in sharing), max(c.tree_nodes for c in sharing)
        sessions = Verifying(engine.model, texts[:num_sessions], context, tree_nodes)
        for case in sharing:
            yield _verify(engine, sessions, case)


def _verify(engine: Engine, sessions: Verifying, case: Case) -> Work:
    rows = case.sessions * case.rows
    cost = engine.size.cost(rows, rows, case.sessions * case.context)
    return Work(case, engine.rates, lambda: Timing(sessions.step(case.sessions, case.rows), cost))


def _prefilling(engine: Engine, text: Text, case: Case) -> Work:
    prompt = Prefilling(engine.model, text, case.context, case.rows)
    cost = engine.size.cost(case.rows, 1, case.context)
    return Work(case, engine.rates, lambda: Timing(prompt.step(), cost))


def _drafting(
    engine: Engine, name: str, head: DraftHead, texts: Sequence[Text], context: int
) -> Iterator[Work]:
    """With one thread, as drafters are served."""
    weights, itemsize, ask = num_weights(head), engine.model.dtype.itemsize, Ask()
    drafter = EagleDrafter(head, 1 + TOGETHER, context + DRIFT + RESERVED_ROWS)
    for num_sessions in (1, TOGETHER):
        sessions = Drafting(drafter, texts[:num_sessions], context, ask)
        case = Case("draft", name, num_sessions, ask.num_nodes, context)
        yield Work(case, engine.lone_rates, partial(_draft, sessions, weights, itemsize))


def _draft(sessions: Drafting, weights: int, itemsize: int) -> Timing:
    """Its cost is what the trees tell: a forward for each level, a row for each node that has children."""
    with computing_with(1):
        ms, trees = sessions.step()
    levels, rows = max(max(tree.depths) for tree in trees), sum(len(tree.inner) for tree in trees)
    return Timing(ms, Cost(weights * itemsize * levels, 2 * weights * rows))


def _deciding(engine: Engine, text: Text, context: int) -> Iterator[Work]:
    logits = last_logits(engine.model, text.first(context), TOGETHER)
    for temperature in (0.0, 1.0):
        for n in (1, TOGETHER):
            case = Case("decide", f"T={temperature:g}", n, 1, context)
            yield Work(case, engine.rates, _decision(logits[:n], temperature, context))


def _decision(logits: torch.Tensor, temperature: float, position: int) -> Callable[[], Timing]:
    params = [SamplingParams(temperature, choice=i) for i in range(len(logits))]
    cost = Cost(logits.numel() * logits.element_size(), 0)
    return lambda: Timing(timed(lambda: decide(logits, params, position))[0], cost)


def in_rounds(works: Sequence[Work], repeats: int) -> list[tuple[Work, list[Timing]]]:
    """Every case once a round; the first round warms up."""
    print(f"timing {len(works)} steps in turn, {repeats} times each", file=sys.stderr, flush=True)
    rounds = [_round(works, number) for number in range(1 + repeats)]
    return [(work, [timings[i] for timings in rounds[1:]]) for i, work in enumerate(works)]


def _round(works: Sequence[Work], number: int) -> dict[int, Timing]:
    """In an order of its own: what a case finds in the processor's caches is not always the same."""
    order = Random(number).sample(range(len(works)), len(works))
    return {i: works[i].run() for i in order}


def tabulated(found: Sequence[tuple[Work, Sequence[Timing]]]) -> list[dict[str, Any]]:
    """A row for every case, compared with the first plain step."""
    plain = next(median(t.ms for t in timings) for work, timings in found if work.case[:4] == _PLAIN)
    return [_row(work, timings, plain) for work, timings in found]


def _row(work: Work, timings: Sequence[Timing], plain: float) -> dict[str, Any]:
    every = [timing.ms for timing in timings]
    cost = Cost(mean(t.cost.num_bytes for t in timings), mean(t.cost.flops for t in timings))
    ms, floor = median(every), floor_of(cost, work.rates)
    return {
        **work.case._asdict(),
        "ms": round(ms, 4),
        "middle_half_ms": [round(x, 4) for x in quartiles(every)],
        "floor_ms": round(floor.ms, 4),
        "bound": floor.bound,
        "times_floor": round(ms / floor.ms, 3),
        "times_plain": round(ms / plain, 4),
        "all_ms": [round(x, 4) for x in every],
    }


def steps_table(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    header = ["step", "sessions x rows", "at", "ms", "middle half", "floor ms", "bound by", "x floor", "x 1x1"]
    lines = [_cells(row) for row in result["steps"]]
    skipped = [f"skipped, longer than the target: {', '.join(result['skipped'])}"] if result["skipped"] else []
    return "\n".join([*_heading(result), "", *_aligned([header, *lines]), *skipped])


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["middle_half_ms"]
    return [
        f"{row['kind']} {row['detail']}".strip(), f"{row['sessions']} x {row['rows']}", f"{row['context']:,}",
        f"{row['ms']:.2f}", f"{low:.2f} to {high:.2f}", _short(row["floor_ms"]), row["bound"],
        f"{row['times_floor']:.1f}", _short(row["times_plain"]),
    ]  # fmt: skip


def _short(x: float) -> str:
    """Of numbers that may be thousandths."""
    return f"{x:.3f}" if x < 0.1 else f"{x:.2f}"


def _heading(result: Mapping[str, Any]) -> list[str]:
    where, floor = result["provenance"], result["floor"]
    made, plan = where["made_with"], where["plan"]
    load = " ".join(f"{x:.2f}" for x in made["load"])
    busy = ": others compute here too, which slows steps" if made["load"][0] > _QUIET else ""
    return [
        f"target {where['target']} in {plan['dtype']} on {made['device']}, medians of {plan['repeats']}; "
        f"threads: {where['threads']}, and 1 to draft",
        f"numerics {where['numerics']}",
        f"memory {floor['gb_per_s']} GB/s, compute {floor['gflop_per_s']:.0f} GFLOP/s; the linear weights are "
        f"{floor['linear_bytes'] / 1e6:.0f} MB, read in {floor['memory_ms']:.2f} ms",
        f"load before {load}{busy}",
    ]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
