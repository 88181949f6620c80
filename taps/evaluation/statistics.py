"""Ratios over questions with bootstrap intervals. Knows counts; nothing of how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_RESAMPLES = 2000


class Interval(NamedTuple):
    low: float
    high: float


class QuestionCounts(NamedTuple):
    """One question under one strategy."""

    tokens: int
    passes: int


def pooled(questions: Sequence[QuestionCounts]) -> float:
    """Σ tokens / Σ passes: the acceptance length."""
    passes = sum(q.passes for q in questions)
    return sum(q.tokens for q in questions) / passes if passes else 0.0


def per_question_mean(questions: Sequence[QuestionCounts]) -> float:
    """Mean over questions of tokens / passes, the paper's form."""
    ratios = [q.tokens / q.passes for q in questions if q.passes]
    return sum(ratios) / len(ratios) if ratios else 0.0


def bootstrap(questions: Sequence[QuestionCounts], seed: int = 0) -> Interval:
    """The 95 % interval of `pooled`, questions resampled with replacement."""
    tokens, passes = _resampled(questions, seed)
    return _middle(tokens / passes)


def bootstrap_ratio(
    ours: Sequence[QuestionCounts], theirs: Sequence[QuestionCounts], seed: int = 0
) -> Interval:
    """The 95 % interval of `pooled(ours) / pooled(theirs)`, the same questions resampled for both."""
    tokens, passes = _resampled(ours, seed)
    other_tokens, other_passes = _resampled(theirs, seed)
    return _middle(tokens / passes / (other_tokens / other_passes))


def bootstrap_mean(questions: Sequence[QuestionCounts], seed: int = 0) -> Interval:
    """The 95 % interval of `per_question_mean`, questions resampled with replacement."""
    ratios = torch.tensor([q.tokens / q.passes for q in questions if q.passes], dtype=torch.float64)
    return _middle(ratios[_drawn(len(ratios), seed)].mean(1))


def mean_ratio(ours: Sequence[Sequence[QuestionCounts]], theirs: Sequence[Sequence[QuestionCounts]]) -> float:
    """Ratio of the means over benchmarks of `pooled`."""
    return sum(map(pooled, ours)) / sum(map(pooled, theirs))


def bootstrap_mean_ratio(
    ours: Sequence[Sequence[QuestionCounts]], theirs: Sequence[Sequence[QuestionCounts]], seed: int = 0
) -> Interval:
    """The 95 % interval of `mean_ratio`, the same questions of each benchmark resampled for both."""

    def lengths(of: Sequence[Sequence[QuestionCounts]]) -> torch.Tensor:
        sums = [_resampled(questions, seed + number) for number, questions in enumerate(of)]
        return torch.stack([tokens / passes for tokens, passes in sums]).mean(0)

    return _middle(lengths(ours) / lengths(theirs))


def share_ratio(sums: Sequence[float]) -> float:
    """(a / b) / (c / d) of four sums."""
    a, b, c, d = sums
    return (a / b) / (c / d)


def bootstrap_share_ratio(questions: Sequence[Sequence[int]], seed: int = 0) -> Interval:
    """The 95 % interval of `share_ratio` of the sums over questions, each giving (a, b, c, d)."""
    sums = torch.tensor(questions, dtype=torch.float64)[_drawn(len(questions), seed)].sum(1).clamp_min(1)
    return _middle((sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3]))


def _drawn(count: int, seed: int) -> torch.Tensor:
    """Indices [resamples, count], drawn with replacement."""
    return torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def _resampled(questions: Sequence[QuestionCounts], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of tokens and passes [resamples]; the same seed draws the same questions."""
    counts = torch.tensor(questions, dtype=torch.float64)
    sums = counts[_drawn(len(questions), seed)].sum(1)
    return sums[:, 0], sums[:, 1].clamp_min(1)


def _middle(values: torch.Tensor) -> Interval:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(low, high)


def quartiles(values: Sequence[float]) -> Interval:
    """Where the middle half of the values lies."""
    low, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.75])).tolist()
    return Interval(low, high)
