"""Evaluating specialists on a benchmark: the target's run recorded once, every strategy replayed on it.

Knows benchmarks, heads and strategies; nothing of plots.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from taps import __version__
from taps.composing import STRATEGIES, Compose, concatenated
from taps.drafting.drafter import Ask
from taps.drafting.eagle import EagleDrafter
from taps.evaluation.analysis import DrafterAnalysis
from taps.evaluation.questions import Question, load_questions
from taps.evaluation.replay import Strategy, replay
from taps.evaluation.statistics import (
    QuestionCounts,
    bootstrap,
    bootstrap_mean,
    per_question_mean,
    pooled,
)
from taps.metrics import SpeculationCounts
from taps.models.checkpoints import load_head, weights_digest
from taps.models.embedded import target_path
from taps.sampling import SamplingParams
from taps.threads import computing_with
from taps.training.answers import AnswerRecipe, answer_sampling
from taps.training.shards import Recording, load_shard, shards
from taps.training.sources import Prompt
from taps.training.specialist import answer_prompts

SMALL_TREES = (8, 16)  # what one stream on two cores can afford
_UNBOUNDED = 1 << 20
_GIT_TIMEOUT_S = 10


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured on which questions."""

    benchmark: str
    questions: int
    new_tokens: int  # per turn
    temperature: float
    seed: int
    num_nodes: int  # of every tree, root included
    depth: int
    top_k: int
    batch_size: int = 16


class Run(NamedTuple):
    """One recorded turn of a question, and the sampling it was recorded with."""

    question: str
    recording: Recording
    params: SamplingParams


def record(target: str, questions: Sequence[Question], work: Path, plan: EvaluationPlan) -> list[Run]:
    """The target's answers to every turn of every question; those `work` holds are not generated again."""
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    recipe = AnswerRecipe(
        answer_tokens=_UNBOUNDED, max_new_tokens=plan.new_tokens, max_prompt_tokens=1024,
        temperatures=(plan.temperature,), answers_per_prompt=1, sessions=plan.batch_size, seed=plan.seed,
    )  # fmt: skip
    runs: list[Run] = []
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
                params = answer_sampling(question.id, plan.temperature, plan.seed)
                runs.append(Run(question.id, recording, params))
                answer = recording.tokens[recording.answer_start :].tolist()
                text = tokenizer.decode(answer, skip_special_tokens=True)
                said[question.id].append({"role": "assistant", "content": text})
    return runs


def strategies_for(
    combined: Sequence[str], alone: Sequence[str], num_nodes: int, small: Sequence[int] = SMALL_TREES
) -> list[Strategy]:
    """Each head alone, every way to combine the first ones, the paper's concatenation, and the oracle.

    All at `num_nodes`, except `union` (no budget) and `concatenated` (every node of every tree). Heads alone
    and merged also at the `small` sizes, which are prefixes of the same trees.
    """
    together = tuple(range(len(combined)))
    composed: dict[str, Compose | None] = {n: STRATEGIES[n] for n in ("confidence", "entropy", "merged")}
    singles = [
        Strategy(name, (i,), STRATEGIES["single"], num_nodes) for i, name in enumerate([*combined, *alone])
    ]
    rows = [*singles]
    rows += [Strategy(name, together, c, num_nodes) for name, c in (composed | {"oracle": None}).items()]
    merging = next(row for row in rows if row.name == "merged")
    sizes = [size for size in small if size < num_nodes]
    rows += [replace(row, num_nodes=size) for size in sizes for row in (*singles, merging)]
    rows.append(Strategy("union", together, STRATEGIES["merged"], _UNBOUNDED))
    return [*rows, Strategy("concatenated", together, concatenated, len(combined) * (num_nodes - 1) + 1)]


@dataclass
class _Row:
    """One strategy's counts so far."""

    strategy: Strategy
    coupled: bool
    totals: SpeculationCounts = field(default_factory=SpeculationCounts)
    chosen: Counter[int] = field(default_factory=Counter)
    questions: dict[str, SpeculationCounts] = field(default_factory=dict)

    @property
    def label(self) -> str:
        size = self.strategy.num_nodes
        return f"{self.strategy.name}{'*' * self.coupled}" + ("" if size == _UNBOUNDED else f"@{size}")

    def add(self, question: str, counts: SpeculationCounts, chosen: Counter[int]) -> None:
        self.totals += counts
        self.chosen += chosen
        self.questions[question] = self.questions.get(question, SpeculationCounts()) + counts

    def as_json(self, names: Sequence[str]) -> dict[str, Any]:
        totals = self.totals
        questions = [QuestionCounts(c.num_tokens, c.num_passes) for c in self.questions.values()]
        row = {
            "strategy": self.strategy.name,
            "drafters": [names[i] for i in self.strategy.drafters],
            "coupled": self.coupled,
            "num_nodes": None if self.strategy.num_nodes == _UNBOUNDED else self.strategy.num_nodes,
            "acceptance_length": round(pooled(questions), 4),
            "interval_95": [round(edge, 4) for edge in bootstrap(questions)],
            "per_question_mean": round(per_question_mean(questions), 4),
            "per_question_interval_95": [round(edge, 4) for edge in bootstrap_mean(questions)],
            "nodes_per_pass": round(totals.num_draft_tokens / max(totals.num_passes, 1), 2),
            "histogram": totals.histogram(),
            "accepted_by_depth": self._by_depth(totals, names),
            "chosen": {names[i]: n for i, n in sorted(self.chosen.items())},
            "questions": questions,
        }
        if self.strategy.compose is concatenated:  # the claim about depths is about this one
            row["question_depths"] = [self._by_depth(counts, names) for counts in self.questions.values()]
        return row

    def _by_depth(self, counts: SpeculationCounts, names: Sequence[str]) -> dict[str, list[int]]:
        """Accepted tokens that each drafter proposed, by depth from 1."""
        depths = range(1, self.totals.max_depth + 1)
        return {names[i]: [counts.accepted_at[i, depth] for depth in depths] for i in self.strategy.drafters}


def evaluate(
    target: str, combined: Sequence[Path], alone: Sequence[Path], data: str | Path, work: Path,
    plan: EvaluationPlan,
) -> dict[str, Any]:  # fmt: skip
    """τ of every strategy over the benchmark, with what it was measured on.

    Args: combined: heads that are routed and merged; alone: further ones, measured by themselves.
    """
    environment = made_with()
    path = target_path(target)
    names = unlike_names([*combined, *alone])
    with computing_with(1):
        heads = [load_head(head, path, torch.float32) for head in (*combined, *alone)]
    questions = load_questions(data, plan.questions)
    runs = record(path, questions, work, plan)
    drafters = [EagleDrafter(head, plan.batch_size, max_len=4096) for head in heads]
    strategies = strategies_for(names[: len(combined)], names[len(combined) :], plan.num_nodes)
    couplings = (False, True) if plan.temperature else (False,)
    rows = [_Row(strategy, coupled) for coupled in couplings for strategy in strategies]
    analyses = [DrafterAnalysis() for _ in drafters]
    ask = Ask(plan.num_nodes, plan.depth, plan.top_k)
    for start in range(0, len(runs), plan.batch_size):
        batch = runs[start : start + plan.batch_size]
        for analysis, head in zip(analyses, heads, strict=True):
            analysis.observe_tokens(head, [run.recording for run in batch])
        for coupled in couplings:
            of_coupling = [row for row in rows if row.coupled == coupled]
            asks = [replace(ask, sampling=run.params if coupled else None) for run in batch]
            replayed = replay(drafters, [run.recording for run in batch], asks, strategies)
            for run, (walks, trees) in zip(batch, replayed, strict=True):
                for row, walk in zip(of_coupling, walks, strict=True):
                    row.add(run.question, walk.counts, walk.chosen)
                for analysis, grown in zip(analyses, trees, strict=True):
                    if not coupled:
                        analysis.observe_trees(run.recording, grown)
        shown = ", ".join(f"{row.label} {row.totals.acceptance_length:.2f}" for row in rows)
        print(f"{plan.benchmark} {start + len(batch)}/{len(runs)}: {shown}", flush=True)
    return {
        "plan": asdict(plan),
        "target": target,
        "heads": heads_made([*combined, *alone]),
        "questions": {"ids": list(rows[0].questions), "sha256": digest(questions)},
        "runs": len(runs),
        "made_with": environment,
        "rows": [row.as_json(names) for row in rows],
        "analysis": {name: a.as_json() for name, a in zip(names, analyses, strict=True)},
    }


def unlike_names(heads: Sequence[Path]) -> list[str]:
    """What results call heads: the names of their directories. Raises `ValueError` where two have the same."""
    names = [head.name for head in heads]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"two heads are called {twice[0]}: results could not tell them apart; rename a directory"
        )
    return names


def heads_made(heads: Sequence[Path]) -> dict[str, Any]:
    """How heads came to be, by name, as their configs say."""
    made = {}
    for head in heads:
        settings = json.loads((head / "config.json").read_text()) if (head / "config.json").is_file() else {}
        made[head.name] = settings.get("taps", {"path": str(head)})
        made[head.name]["weights_sha256"] = weights_digest(head)
    return made


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked, so that results tell whether they are of the same questions."""
    asked = json.dumps([asdict(question) for question in questions])
    return hashlib.sha256(asked.encode()).hexdigest()


def commit() -> str | None:
    """The commit of the code that runs, if it runs in a checkout. Ask before measuring: others may commit."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        asked = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None


def made_with() -> dict[str, Any]:
    """Versions and machine, for a result. Ask before measuring, as for `commit`."""
    return {
        "taps": __version__, "torch": torch.__version__, "commit": commit(), "cores": os.cpu_count(),
        "machine": platform.machine(),
    }  # fmt: skip


def refuse_unwritable(path: Path) -> None:
    """Raise `OSError` where no result can be written to `path`, before anything is measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"{path} cannot be written; name another file for the result")


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)
