"""Evaluating specialists on a benchmark: the target's run recorded once, every strategy replayed on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from taps import __version__
from taps.composing import STRATEGIES, Compose
from taps.drafting.drafter import Ask
from taps.drafting.eagle import EagleDrafter
from taps.evaluation.questions import Question, load_questions
from taps.evaluation.replay import Strategy, grow_trees, replay
from taps.metrics import SpeculationCounts
from taps.models.checkpoints import load_head
from taps.models.embedded import target_path
from taps.training.answers import AnswerRecipe
from taps.training.shards import Recording, load_shard, shards
from taps.training.sources import Prompt
from taps.training.specialist import answer_prompts

_UNBOUNDED = 1 << 20


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured on which questions."""

    benchmark: str
    questions: int
    new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    num_nodes: int = 60
    depth: int = 5
    top_k: int = 10
    batch_size: int = 16


def record(target: str, questions: Sequence[Question], work: Path, plan: EvaluationPlan) -> list[Recording]:
    """The target's answers to every turn of every question; those `work` holds are not generated again."""
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    recipe = AnswerRecipe(
        answer_tokens=_UNBOUNDED, max_new_tokens=plan.new_tokens, max_prompt_tokens=1024,
        temperatures=(plan.temperature,), batch_size=plan.batch_size, seed=plan.seed,
    )  # fmt: skip
    recordings: list[Recording] = []
    said: dict[str, list[dict[str, str]]] = {question.id: [] for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if turn < len(question.turns)]
        for question in asked:
            said[question.id].append({"role": "user", "content": question.turns[turn]})
        prompts = [Prompt(question.id, tuple(said[question.id])) for question in asked]
        directory = work / f"turn-{turn + 1}"
        answer_prompts(target, prompts, directory, recipe)
        answered = {r.id: r for path in shards(directory) for r in load_shard(path)}
        for question in asked:
            if (recording := answered.get(question.id)) is not None:
                recordings.append(recording)
                answer = recording.tokens[recording.answer_start :].tolist()
                text = tokenizer.decode(answer, skip_special_tokens=True)
                said[question.id].append({"role": "assistant", "content": text})
    return recordings


def strategies_for(names: Sequence[str], num_nodes: int) -> list[Strategy]:
    """Each head alone, every way to combine them all at the same size, and the union without a budget."""
    everyone = tuple(range(len(names)))
    combined: dict[str, Compose] = {n: STRATEGIES[n] for n in ("confidence", "entropy", "merged")}
    rows = [Strategy(name, (i,), STRATEGIES["single"], num_nodes) for i, name in enumerate(names)]
    rows += [Strategy(name, everyone, compose, num_nodes) for name, compose in combined.items()]
    return [*rows, Strategy("union", everyone, STRATEGIES["merged"], _UNBOUNDED)]


def evaluate(
    target: str, heads: Sequence[Path], data: Path, work: Path, plan: EvaluationPlan
) -> dict[str, Any]:
    """τ of every strategy, pooled over the benchmark, with what it was measured on."""
    path = target_path(target)
    questions = load_questions(data, plan.questions)
    recordings = record(path, questions, work, plan)
    ask = Ask(plan.num_nodes, plan.depth, plan.top_k)
    strategies = strategies_for([head.name for head in heads], plan.num_nodes)
    totals = [SpeculationCounts() for _ in strategies]
    drafters = [
        EagleDrafter(load_head(head, path, torch.float32), plan.batch_size, max_len=4096) for head in heads
    ]
    for start in range(0, len(recordings), plan.batch_size):
        batch = recordings[start : start + plan.batch_size]
        grown = [grow_trees(drafter, batch, ask, i) for i, drafter in enumerate(drafters)]
        for i, recording in enumerate(batch):
            counts = replay(recording, [trees[i] for trees in grown], strategies)
            totals = [total + more for total, more in zip(totals, counts, strict=True)]
        shown = ", ".join(
            f"{s.name} {t.acceptance_length:.2f}" for s, t in zip(strategies, totals, strict=True)
        )
        print(f"{plan.benchmark} {start + len(batch)}/{len(recordings)}: {shown}", flush=True)
    return {
        "plan": asdict(plan),
        "target": target,
        "heads": [str(head) for head in heads],
        "recordings": len(recordings),
        "made_with": {"taps": __version__, "torch": torch.__version__},
        "acceptance_length": {
            strategy.name: round(total.acceptance_length, 4)
            for strategy, total in zip(strategies, totals, strict=True)
        },
        "passes": {s.name: t.num_passes for s, t in zip(strategies, totals, strict=True)},
        "histogram": {s.name: t.histogram() for s, t in zip(strategies, totals, strict=True)},
    }


def write_result(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
