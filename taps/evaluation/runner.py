"""Evaluating specialists on a benchmark: the target's run recorded once, every strategy replayed on it.

Knows benchmarks, heads and strategies; nothing of plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from taps.drafting.drafter import Ask
from taps.drafting.eagle import EagleDrafter
from taps.engine.threads import computing_with
from taps.evaluation.analysis import DrafterAnalysis
from taps.evaluation.questions import digest, load_questions
from taps.evaluation.recorded import EvaluationPlan, Run, record
from taps.evaluation.replay import replay
from taps.evaluation.strategies import MeasuredRow, strategies_for
from taps.models.checkpoints import load_head
from taps.models.draft_head import DraftHead
from taps.models.embedded import target_path
from taps.provenance import heads_made, made_with, unlike_names


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
    measured = _Measured(heads, names, len(combined), plan)
    for start in range(0, len(runs), plan.batch_size):
        batch = runs[start : start + plan.batch_size]
        measured.add(batch)
        print(f"{plan.benchmark} {start + len(batch)}/{len(runs)}: {measured.line()}", flush=True)
    return {
        "plan": asdict(plan),
        "target": target,
        "heads": heads_made([*combined, *alone]),
        "questions": {"ids": measured.questions, "sha256": digest(questions)},
        "runs": len(runs),
        "made_with": environment,
        **measured.as_json(),
    }


class _Measured:
    """All strategies on the runs so far, coupled too where that differs, and what each drafter is like."""

    def __init__(
        self, heads: Sequence[DraftHead], names: Sequence[str], num_combined: int, plan: EvaluationPlan
    ) -> None:
        self._heads = heads
        self._names = names
        self._drafters = [EagleDrafter(head, plan.batch_size, max_len=4096) for head in heads]
        self._strategies = strategies_for(names[:num_combined], names[num_combined:], plan.num_nodes)
        self._rows = {
            coupled: [MeasuredRow(strategy, coupled) for strategy in self._strategies]
            for coupled in ((False, True) if plan.temperature else (False,))
        }
        self._analyses = [DrafterAnalysis() for _ in heads]
        self._ask = Ask(plan.num_nodes, plan.depth, plan.top_k)

    def add(self, batch: Sequence[Run]) -> None:
        """Replay a batch of runs."""
        for analysis, head in zip(self._analyses, self._heads, strict=True):
            analysis.observe_tokens(head, [run.recording for run in batch])
        for coupled in self._rows:
            self._replay(batch, coupled)

    def _replay(self, batch: Sequence[Run], coupled: bool) -> None:
        asks = [replace(self._ask, sampling=run.params if coupled else None) for run in batch]
        replayed = replay(self._drafters, [run.recording for run in batch], asks, self._strategies)
        for run, (walks, trees) in zip(batch, replayed, strict=True):
            for row, walk in zip(self._rows[coupled], walks, strict=True):
                row.add(run.question, walk.counts, walk.chosen)
            for analysis, grown in zip(self._analyses, trees, strict=True):
                if not coupled:
                    analysis.observe_trees(run.recording, grown)

    @property
    def _every_row(self) -> list[MeasuredRow]:
        return [row for rows in self._rows.values() for row in rows]

    @property
    def questions(self) -> list[str]:
        """Ids of those that were measured."""
        return list(self._every_row[0].questions)

    def line(self) -> str:
        return ", ".join(f"{row.label} {row.totals.acceptance_length:.2f}" for row in self._every_row)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [row.as_json(self._names) for row in self._every_row],
            "analysis": {n: a.as_json() for n, a in zip(self._names, self._analyses, strict=True)},
        }
