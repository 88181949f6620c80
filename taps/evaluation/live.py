"""Wall-clock speed in this process: every strategy against plain decoding, interleaved question by question.

A machine whose speed drifts does not matter: ratios are taken within a question. Knows verifiers, drafters and
strategies; nothing of Ray or HTTP (`cluster.bench` measures a running cluster).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from taps import __version__
from taps.composing import STRATEGIES, Compose, concatenated
from taps.context import Context
from taps.decoding import Panel, decode
from taps.drafting.drafter import Ask
from taps.drafting.eagle import EagleDrafter
from taps.evaluation.questions import load_questions
from taps.evaluation.runner import commit
from taps.local import LocalDrafter, LocalVerifier, in_process
from taps.metrics import SpeculationCounts
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import load_head
from taps.models.embedded import target_path
from taps.sampling import SamplingParams
from taps.target import Target
from taps.threads import computing_with
from taps.tree import ProposalTree

PLAIN = "off"
_MAX_LEN = 2048
_PATIENT_S = 60.0


@dataclass(frozen=True)
class LivePlan:
    """What is timed on which questions. Trees are small: on two cores a large one costs more than it saves."""

    benchmark: str
    questions: int = 10
    new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    num_nodes: int = 8
    depth: int = 3
    top_k: int = 3


class Timed(NamedTuple):
    """One answer. Times are of decoding, the prefill not counted."""

    seconds: float
    draft_ms: float
    verify_ms: float
    counts: SpeculationCounts

    @property
    def tokens_per_second(self) -> float:
        return self.counts.num_tokens / self.seconds


async def time_answer(
    prompt: Sequence[int], verifier: LocalVerifier, drafters: Sequence[LocalDrafter], compose: Compose,
    ask: Ask, params: SamplingParams, new_tokens: int,
) -> Timed:  # fmt: skip
    """Decode one answer of `new_tokens` tokens; end tokens do not end it, so that all answers are as long."""
    context, counts = Context(prompt, _MAX_LEN), SpeculationCounts()
    draft_ms = verify_ms = started = 0.0
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(d.session(i)) for i, d in enumerate(drafters)]
        panel = Panel(sessions, _PATIENT_S)
        steps = decode(context, lambda: verifier.session(params), panel, compose, ask)
        async with aclosing(steps):
            async for step in steps:
                if step.is_prefill:
                    started = time.perf_counter()
                    continue
                counts.observe(step.verdict, len(step.verdict.tokens))
                draft_ms, verify_ms = draft_ms + step.draft_ms, verify_ms + step.verify_ms
                if context.num_generated >= new_tokens:
                    break
        seconds = time.perf_counter() - started
    return Timed(seconds, draft_ms, verify_ms, counts)


def measure(
    target: str, heads: Sequence[Path], alone: Sequence[Path], data: str | Path, plan: LivePlan
) -> dict[str, Any]:
    """Speed of each head alone and of every way to combine the first ones, as ratios to plain decoding.

    Args: heads: those that are combined; alone: further ones, timed by themselves.
    """
    path = target_path(target)
    with computing_with(1) as num_threads:
        engine = Target(CausalLM.load(path, torch.bfloat16), 2, _MAX_LEN)
        named = [(h.name, EagleDrafter(load_head(h, path, torch.bfloat16), 2)) for h in (*heads, *alone)]
        with in_process(engine, named, num_threads) as (verifier, drafters):
            settings: dict[str, tuple[Compose, list[LocalDrafter]]] = {PLAIN: (STRATEGIES["off"], [])}
            settings |= {drafter.name: (STRATEGIES["single"], [drafter]) for drafter in drafters}
            together = drafters[: len(heads)]
            settings |= {name: (STRATEGIES[name], together) for name in ("confidence", "entropy", "merged")}
            settings["concatenated"] = (_every_node, together)
            timed = _time_all(AutoTokenizer.from_pretrained(path), verifier, settings, data, plan)
    return {
        "plan": asdict(plan),
        "made_with": {"taps": __version__, "torch": torch.__version__, "commit": commit()},
        "threads": num_threads,
        "rows": [_row(name, rows, timed[PLAIN]) for name, rows in timed.items()],
    }


def _time_all(
    tokenizer: Any, verifier: LocalVerifier, settings: Mapping[str, tuple[Compose, list[LocalDrafter]]],
    data: str | Path, plan: LivePlan,
) -> dict[str, list[Timed]]:  # fmt: skip
    """Strategy -> its answers. Args: settings: strategy -> how trees are composed, and of which drafters."""
    timed: dict[str, list[Timed]] = {name: [] for name in settings}
    for number, question in enumerate(load_questions(data, plan.questions)):
        messages = [{"role": "user", "content": question.turns[0]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        params = SamplingParams(plan.temperature, seed=plan.seed, choice=number)
        ask = Ask(plan.num_nodes, plan.depth, plan.top_k, params)
        for name in _turned(list(settings), number):
            compose, panel = settings[name]
            answer = time_answer(prompt, verifier, panel, compose, ask, params, plan.new_tokens)
            timed[name].append(asyncio.run(answer))
        shown = ", ".join(
            f"{name} {rows[-1].tokens_per_second / timed[PLAIN][-1].tokens_per_second:.2f}"
            for name, rows in timed.items()
        )
        print(f"{plan.benchmark} {number + 1}/{plan.questions}: {shown}", flush=True)
    return timed


def _every_node(trees: Sequence[ProposalTree], root: int, _: int) -> ProposalTree:
    """The paper's merging: all nodes of all trees, duplicates too."""
    return concatenated(trees, root)


def _turned(names: list[str], number: int) -> list[str]:
    """Another order for every question."""
    first = number % len(names)
    return names[first:] + names[:first]


def _row(name: str, rows: Sequence[Timed], plain: Sequence[Timed]) -> dict[str, Any]:
    ratios = [
        ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in zip(rows, plain, strict=True)
    ]
    passes = sum(row.counts.num_passes for row in rows)
    return {
        "strategy": name,
        "speed_ratio_median": round(statistics.median(ratios), 4),
        "speed_ratios": [round(ratio, 4) for ratio in ratios],
        "tokens_per_second_median": round(statistics.median(row.tokens_per_second for row in rows), 2),
        "acceptance_length": round(sum(row.counts.num_tokens for row in rows) / passes, 4),
        "draft_ms": round(sum(row.draft_ms for row in rows) / passes, 2),
        "verify_ms": round(sum(row.verify_ms for row in rows) / passes, 2),
        "nodes_per_pass": round(sum(row.counts.num_draft_tokens for row in rows) / passes, 2),
    }
