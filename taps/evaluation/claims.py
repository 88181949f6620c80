"""The claims of TAPS and ours, each with the comparisons that bear on it and the verdict they give.

Knows results; nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from taps.evaluation.results import ADAPTED, Key, Results, counts, plain_name, row_of
from taps.evaluation.statistics import (
    Interval,
    bootstrap_mean_ratio,
    bootstrap_ratio,
    bootstrap_share_ratio,
    mean_ratio,
    pooled,
    share_ratio,
)

_SPECIALIST_OF = {"gsm8k": "math", "math_500": "math", "svamp": "math", "mt_bench": "chat", "humaneval": "code"}


@dataclass(frozen=True)
class Comparison:
    """Two strategies on one result, and what the claim says of them."""

    key: Key
    ours: str
    theirs: str
    ratio: float
    interval: Interval

    def holds(self, share: float = 1.0) -> bool | None:
        """Whether ours is above this share of theirs; None where the interval does not tell."""
        if self.interval.low > share:
            return True
        return False if self.interval.high < share else None

    def line(self) -> str:
        low, high = self.interval
        where = f"{self.key.benchmark}, temperature {self.key.temperature:g}, {self.key.recipe}"
        return f"{where}: {self.ours} / {self.theirs} = {self.ratio:.3f} [{low:.3f}, {high:.3f}]"


def compare(
    key: Key, result: dict[str, Any], ours: str, theirs: str, coupled: bool = False
) -> Comparison | None:
    """The ratio of two strategies' acceptance lengths; None where one was not measured."""
    one, other = row_of(result, ours, coupled), row_of(result, theirs, coupled)
    if one is None or other is None:
        return None
    interval = bootstrap_ratio(counts(one), counts(other))
    return Comparison(key, ours, theirs, pooled(counts(one)) / pooled(counts(other)), interval)


def compare_means(
    results: Results, recipe: str, temperature: float, ours: str, theirs: str, coupled: bool = False
) -> Comparison | None:
    """The same for the means over all benchmarks on which both were measured; None where there are none."""
    rows = [
        (row_of(result, ours, coupled), row_of(result, theirs, coupled))
        for key, result in results.items()
        if (key.recipe, key.temperature) == (recipe, temperature)
    ]
    both = [(counts(one), counts(other)) for one, other in rows if one is not None and other is not None]
    if not both:
        return None
    one_side, other_side = [pair[0] for pair in both], [pair[1] for pair in both]
    key = Key(recipe, f"mean of {len(both)} benchmarks" + ", coupled" * coupled, temperature)
    interval = bootstrap_mean_ratio(one_side, other_side)
    return Comparison(key, ours, theirs, mean_ratio(one_side, other_side), interval)


def depth_shift(key: Key, result: dict[str, Any]) -> Comparison | None:
    """The specialist's share of the accepted tokens of the paper's merged tree, deep down against at the top.

    A token that both drafters proposed counts for both. None where the specialist was not measured.
    """
    row, own = row_of(result, "concatenated"), _SPECIALIST_OF.get(key.benchmark)
    by_question = [
        {plain_name(name): accepted for name, accepted in depths.items()}
        for depths in (row or {}).get("question_depths", [])
    ]
    if not by_question or own not in by_question[0] or len(by_question[0]) < 2:
        return None
    shares = [_deep_and_first(depths, own) for depths in by_question]
    sums = [sum(column) for column in zip(*shares, strict=True)]
    if not all(sums):
        return None
    names = f"share of {own} at depth 3 and more", "its share at depth 1"
    return Comparison(key, *names, share_ratio(sums), bootstrap_share_ratio(shares))


def _deep_and_first(by_depth: dict[str, list[int]], own: str) -> tuple[int, int, int, int]:
    """Accepted tokens: the specialist's and all at depth 3 and more, the specialist's and all at depth 1."""
    total = [sum(column) for column in zip(*by_depth.values(), strict=True)]
    return sum(by_depth[own][2:]), sum(total[2:]), by_depth[own][0], total[0]


@dataclass(frozen=True)
class Claim:
    """A claim and the comparisons that bear on it."""

    statement: str
    comparisons: list[Comparison]
    by_paper: bool = True  # else by us
    share: float = 1.0  # of what ours is compared with, that it has to reach

    @property
    def verdict(self) -> str:
        decided = [c.holds(self.share) for c in self.comparisons]
        true, false = ("reproduced", "not reproduced") if self.by_paper else ("holds", "does not hold")
        num, against = len(decided), decided.count(False)
        if not decided:
            return "not measurable here"
        if against:
            return f"{false}: {against} of {num} against it"
        if True not in decided:
            return f"{false}: every interval includes {self.share:g}"
        return true if all(decided) else f"{true} in {decided.count(True)} of {num}, the others undecided"


Pair = tuple[str, str]


def claims(results: Results) -> list[Claim]:
    """The claims of TAPS and ours, each over all results that can bear on it."""

    def gather(pairs_for: Callable[[Key], Iterable[Pair]]) -> list[Comparison]:
        found = [compare(k, r, *pair) for k, r in results.items() for pair in pairs_for(k)]
        return [comparison for comparison in found if comparison is not None]

    def specialists(key: Key) -> list[Pair]:
        own = _SPECIALIST_OF.get(key.benchmark)
        return [(own, other) for other in ("math", "chat") if own in ("math", "chat") and other != own]

    def mixed(key: Key) -> list[Pair]:
        return [("mixed-half", other) for _, other in specialists(key)]

    def means(ours: str, *others: str, adapted: bool | None = None) -> list[Comparison]:
        runs = dict.fromkeys((k.recipe, k.temperature, c) for k in results for c in (False, True))
        taken = [run for run in runs if adapted is None or (run[0] == ADAPTED) == adapted]
        found = [compare_means(results, m, t, ours, other, c) for m, t, c in taken for other in others]
        return [comparison for comparison in found if comparison is not None]

    shifts = [shift for k, r in results.items() if (shift := depth_shift(k, r)) is not None]
    return [
        Claim("Training specialises: each specialist is best on its own domain", gather(specialists)),
        Claim("Mixed data is robust: the mixed head beats the specialist of the other domain", gather(mixed)),
        Claim("More mixed data is better than half of it", gather(lambda _: [("mixed-full", "mixed-half")])),
        Claim("Averaging weights collapses: each specialist beats the average",
              gather(lambda _: [("math", "averaged"), ("chat", "averaged")])),
        Claim("Confidence routes better than entropy", gather(lambda _: [("confidence", "entropy")])),
        Claim("Merging (the paper's, every node of both trees) beats confidence routing",
              gather(lambda _: [("concatenated", "confidence")])),
        Claim("Depth shifts towards the specialist: its share of the accepted tokens grows", shifts),
        Claim("Merging within the same nodes beats confidence routing",
              gather(lambda _: [("merged", "confidence")]), by_paper=False),
        Claim("Within the same nodes, on average over the benchmarks, merging beats each specialist",
              means("merged", "math", "chat", "code"), by_paper=False),
        Claim("Within the same nodes, on average over the benchmarks, merging beats the mixed heads",
              means("merged", "mixed-half", "mixed-full", adapted=False), by_paper=False),
        Claim("The same, with specialists adapted from the mixed head on as much data as it goes on with",
              means("merged", "mixed-full", adapted=True), by_paper=False),
        Claim("Merging within the nodes of one tree reaches 0.97 of all nodes of all trees",
              means("merged", "concatenated", adapted=False), by_paper=False, share=0.97),
        Claim("The same with adapted specialists",
              means("merged", "concatenated", adapted=True), by_paper=False, share=0.97),
    ]  # fmt: skip
