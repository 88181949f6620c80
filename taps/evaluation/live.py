"""Wall-clock speed in this process: every strategy against plain decoding, interleaved question by question.

What `adaptive` learns it learns from one question to the next. A machine whose speed drifts does not matter:
ratios are taken within a question. Knows verifiers, drafters and strategies; nothing of Ray or HTTP
(`cluster.bench` measures a running cluster).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from taps.adaptive.policy import Adaptive, Fleet
from taps.composing import STRATEGIES, Compose, concatenated
from taps.context import Context
from taps.decoding.in_process import decode_in_process, in_process
from taps.decoding.metrics import SpeculationCounts, drafters_in
from taps.decoding.policy import Fixed, Policy, Step
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Ask
from taps.drafting.eagle import EagleDrafter
from taps.engine.scheduling import MAX_LEN, StepBudget
from taps.engine.target import Target
from taps.engine.threads import computing_with
from taps.engine.verifier import BatchedVerifier
from taps.evaluation.questions import Question, digest, load_questions
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import load_head
from taps.models.embedded import target_path
from taps.models.pretrained import load_tokenizer
from taps.provenance import heads_made, made_with, unlike_names
from taps.recording.answers import prompt_tokens
from taps.recording.sources import Prompt
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree

PLAIN = "off"


@dataclass(frozen=True)
class LivePlan:
    """What is timed on which questions. Trees are small: on two cores a large one costs more than it saves."""

    benchmark: str
    questions: int
    new_tokens: int
    temperature: float
    seed: int
    num_nodes: int = Ask.num_nodes
    depth: int = Ask.depth
    top_k: int = Ask.top_k


class Setting(NamedTuple):
    """A way to decode."""

    strategy: str
    coupled: bool  # drafters use the noise the target samples with
    policy: Callable[[Ask], AbstractContextManager[Policy]]  # of one answer
    drafters: Sequence[BatchedDrafter]


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
    prompt: Sequence[int], verifier: BatchedVerifier, drafters: Sequence[BatchedDrafter], policy: Policy,
    params: SamplingParams, new_tokens: int,
) -> Timed:  # fmt: skip
    """Decode one answer of `new_tokens` tokens; end tokens do not end it, so that all answers are as long.

    What the policy explains is printed once the answer is there.
    """
    state = SessionState(tuple(prompt), sampling=params, max_tokens=new_tokens)
    context, counts = Context(state, MAX_LEN), SpeculationCounts()
    draft_ms = verify_ms = started = seconds = 0.0
    explained: list[str] = []
    async with aclosing(decode_in_process(context, verifier, drafters, policy)) as steps:
        async for step in steps:
            if step.is_prefill:
                started = time.perf_counter()
                continue
            counts.observe(step.verdict, len(step.verdict.tokens))
            draft_ms, verify_ms = draft_ms + step.draft_ms, verify_ms + step.verify_ms
            seconds = time.perf_counter() - started
            if step.why is not None:
                explained.append(_explained(step, step.why, [drafter.name for drafter in drafters]))
            if context.num_generated >= new_tokens:
                break
    for line in explained:
        print(line, flush=True)
    return Timed(seconds, draft_ms, verify_ms, counts)


def _explained(step: Step, why: Mapping[str, Any], names: Sequence[str]) -> str:
    """Who was asked in a step, what was thought of it, what was kept and what came of it, on one line."""
    verdict = step.verdict
    asked = [*why["asked"], *(f"{name} aside" for name in why["asked_aside"])]
    kept = Counter(names[i] for owners in step.drafted for i in drafters_in(owners))
    passes = "1 pass" if verdict.num_passes == 1 else f"{verdict.num_passes} passes"
    cost = "" if verdict.cost is None else f", the last in {verdict.cost.ms:.1f} ms"
    return (
        f"  asked {', '.join(asked) or 'nobody'}, depth {why['depth']}: "
        f"{why['expected']:.2f} tokens expected, {why['must_gain']:.2f} must be gained "
        f"({why['drafted_ms']:.1f} ms, plain {why['plain_ms']:.1f}); "
        f"offered {' '.join(f'{score:.2f}' for score in why['offered']) or 'nothing'}; "
        f"kept {', '.join(f'{n} of {name}' for name, n in kept.items()) or 'nothing'}, "
        f"accepted {len(verdict.owners)}: {len(verdict.tokens)} tokens by {passes}{cost}; "
        f"waited {step.draft_ms:.1f} ms for drafts, {step.verify_ms:.1f} for the target"
    )


def measure(
    target: str, heads: Sequence[Path], alone: Sequence[Path], data: str | Path, plan: LivePlan,
    explains: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Speed of each head alone and of every way to combine the first ones, as ratios to plain decoding.

    Args: heads: those that are combined; alone: further ones, timed by themselves; explains: say of every step
    of `adaptive` who was asked, what was kept and why.
    """
    every = [*heads, *alone]
    names, device = unlike_names(every), "cuda" if torch.cuda.is_available() else "cpu"
    environment = made_with() | {"device": device}
    path, questions = target_path(target), load_questions(data, plan.questions)
    with computing_with(1) as num_threads:
        loaded = [load_head(head, path, torch.bfloat16).to(device) for head in every]
        budget = StepBudget(tree_nodes=len(every) * plan.num_nodes)  # nothing is cut
        engine = Target(CausalLM.load(path, torch.bfloat16, device), 2, MAX_LEN, budget)
        named = zip(names, (EagleDrafter(head, 2) for head in loaded), strict=True)
        with in_process(engine, named, num_threads) as (verifier, drafters):
            coupled = (False, True) if plan.temperature else (False,)
            settings = _settings(drafters, len(heads), coupled, explains)
            timed = _time_all(load_tokenizer(path), verifier, settings, questions, plan)
    return {
        "plan": asdict(plan),
        "target": target,
        "heads": heads_made(every),
        "questions": {"ids": [question.id for question in questions], "sha256": digest(questions)},
        "made_with": environment,
        "threads": num_threads,
        "rows": [_row(setting, rows, timed[0]) for setting, rows in zip(settings, timed, strict=True)],
    }


def _settings(
    drafters: Sequence[BatchedDrafter], num_together: int, coupled: Sequence[bool], explains: bool
) -> list[Setting]:
    """Plain decoding, each drafter alone, every way to combine the first ones, and what is served."""
    together = drafters[:num_together]
    composed: list[tuple[str, Compose, Sequence[BatchedDrafter]]] = [
        *((drafter.name, STRATEGIES["single"], [drafter]) for drafter in drafters),
        *((name, STRATEGIES[name], together) for name in ("confidence", "entropy", "merged")),
        ("concatenated", _every_node, together),
    ]
    fixed = [Setting(name, c, _fixed(compose), panel) for c in coupled for name, compose, panel in composed]
    fleet, names = Fleet(), [drafter.name for drafter in together]
    adaptive = Setting(
        "adaptive", coupled[-1], lambda ask: closing(Adaptive(fleet, names, ask, explains)), together
    )
    return [Setting(PLAIN, False, _fixed(STRATEGIES[PLAIN]), []), *fixed, adaptive]


def _fixed(compose: Compose) -> Callable[[Ask], AbstractContextManager[Policy]]:
    return lambda ask: nullcontext(Fixed(compose, ask))


def _time_all(
    tokenizer: Any,
    verifier: BatchedVerifier,
    settings: Sequence[Setting],
    questions: Sequence[Question],
    plan: LivePlan,
) -> list[list[Timed]]:
    """The answers of every setting."""
    timed: list[list[Timed]] = [[] for _ in settings]
    for number, question in enumerate(questions):
        prompt = prompt_tokens(tokenizer, Prompt(question.id, tuple(question.first_turn)))
        params = SamplingParams(plan.temperature, seed=plan.seed, choice=number)
        for i in _turned(range(len(settings)), number):
            _, coupled, policy_of, panel = settings[i]
            ask = Ask(plan.num_nodes, plan.depth, plan.top_k, params if coupled else None)
            with policy_of(ask) as policy:
                answer = time_answer(prompt, verifier, panel, policy, params, plan.new_tokens)
                timed[i].append(asyncio.run(answer))
        plain = timed[0][-1].tokens_per_second
        shown = ", ".join(
            f"{setting.strategy}{' coupled' * setting.coupled} {rows[-1].tokens_per_second / plain:.2f}"
            for setting, rows in zip(settings, timed, strict=True)
        )
        print(f"{plan.benchmark} {number + 1}/{plan.questions}: {shown}", flush=True)
    return timed


def _every_node(trees: Sequence[ProposalTree], root: int, _: int) -> ProposalTree:
    """The paper's merging: all nodes of all trees, duplicates too."""
    return concatenated(trees, root)


def _turned(order: Sequence[int], number: int) -> list[int]:
    """Another order for every question."""
    first = number % len(order)
    return [*order[first:], *order[:first]]


def _row(setting: Setting, rows: Sequence[Timed], plain: Sequence[Timed]) -> dict[str, Any]:
    ratios = [
        ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in zip(rows, plain, strict=True)
    ]
    passes = sum(row.counts.num_passes for row in rows)
    return {
        "strategy": setting.strategy,
        "drafters": [drafter.name for drafter in setting.drafters],
        "coupled": setting.coupled,
        "speed_ratio_median": round(statistics.median(ratios), 4),
        "speed_ratios": [round(ratio, 4) for ratio in ratios],
        "tokens_per_second_median": round(statistics.median(row.tokens_per_second for row in rows), 2),
        "acceptance_length": round(sum(row.counts.num_tokens for row in rows) / passes, 4),
        "draft_ms": round(sum(row.draft_ms for row in rows) / passes, 2),
        "verify_ms": round(sum(row.verify_ms for row in rows) / passes, 2),
        "nodes_per_pass": round(sum(row.counts.num_draft_tokens for row in rows) / passes, 2),
    }
