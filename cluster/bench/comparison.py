"""Medians and ratios with bootstrap intervals. Knows numbers; nothing of servers.

Ratios are taken between what was measured side by side, a *unit*: a round, or a question where one stream asks.
A question that was asked in several rounds is one unit, with the geometric mean of its ratios: asking it again
says nothing of other questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from cluster.bench.measures import Unit

_RESAMPLES = 2000
_MIDDLE = (2.5, 97.5)


class Estimate(NamedTuple):
    """A median, or a mean of medians, with its 95 % interval."""

    value: float
    low: float
    high: float


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median of one value or more, resampled with replacement."""
    return Estimate(float(numpy.median(values)), *_interval(_medians(values, seed)))


def unit_ratios(ours: Mapping[Unit, float], theirs: Mapping[Unit, float]) -> list[float]:
    """A ratio for each unit that both have."""
    logs: dict[int | str, list[float]] = {}
    for unit in ours.keys() & theirs.keys():
        number, question = unit
        logs.setdefault(question or number, []).append(float(numpy.log(ours[unit] / theirs[unit])))
    return [float(numpy.exp(numpy.mean(logs[name]))) for name in sorted(logs, key=str)]


def geometric_mean(workloads: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Of the workloads' medians; the units of each resampled on their own."""
    medians = [numpy.log(numpy.median(units)) for units in workloads]
    drawn = [numpy.log(_medians(units, seed + number)) for number, units in enumerate(workloads)]
    return Estimate(float(numpy.exp(numpy.mean(medians))), *_interval(numpy.exp(numpy.mean(drawn, axis=0))))


def _medians(values: Sequence[float], seed: int) -> NDArray[numpy.float64]:
    """Of resampled values: [resamples]."""
    drawn = numpy.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    medians: NDArray[numpy.float64] = numpy.median(numpy.asarray(values, numpy.float64)[drawn], axis=1)
    return medians


def _interval(values: NDArray[numpy.float64]) -> tuple[float, float]:
    low, high = numpy.percentile(values, _MIDDLE)
    return float(low), float(high)
