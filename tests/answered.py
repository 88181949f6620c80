"""Answers and rounds of a benchmark by hand: times and counts that a test can reckon with."""

from __future__ import annotations

from typing import Any

from cluster.bench.experiment import Cell, Served
from cluster.bench.load import Loop
from cluster.bench.streams import Answer


def answer(question: str = "q", seconds: float = 2.0, tokens: int = 10, **fields: Any) -> Answer:
    """Sent at 0; the first text comes at a tenth of its time, all else at its end."""
    fields = {"arrivals": (seconds / 10, seconds)} | fields
    return Answer(question, 0.0, ended=seconds, tokens=tokens, **fields)


def failed(question: str = "q", seconds: float = 2.0, error: str = "gone") -> Answer:
    return answer(question, seconds, 0, arrivals=(), error=error)


def loop(*answers: Answer, seconds: float | None = None) -> Loop:
    """Args: seconds: how long it took; none: the answers one after the other."""
    return Loop(answers, sum(a.seconds for a in answers) if seconds is None else seconds, 0.01)


def served(
    setting: str,
    speed: float,
    workload: str = "math",
    temperature: float = 0.0,
    streams: int = 4,
    number: int = 0,
) -> Served:
    """One round of one answer, at so many tokens a second."""
    cell = Cell(workload, temperature, streams)
    return Served(setting, cell, number, (loop(answer(tokens=10, seconds=10 / speed)),))
