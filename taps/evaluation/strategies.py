"""The rows of an evaluation: which heads, how combined, at how many nodes; and what each came to.

Knows strategies and counts; nothing of models or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from taps.composing import STRATEGIES, Compose, concatenated
from taps.decoding.metrics import SpeculationCounts
from taps.evaluation.replay import Strategy
from taps.evaluation.statistics import (
    QuestionCounts,
    bootstrap,
    bootstrap_mean,
    per_question_mean,
    pooled,
)

SMALL_TREES = (8, 16)  # what one stream on two cores can afford
_UNBOUNDED = 1 << 20


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
class MeasuredRow:
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
