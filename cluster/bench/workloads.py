"""What is asked: the questions that are shipped, one's own, and a mixture of them. Knows files, not servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from taps.evaluation.questions import Question, load_questions

_DIRECTORY = Path(__file__).resolve().parent.parent / "workloads"
SHIPPED = ("math", "chat", "code", "offdomain")
MIXTURE = "mixture"
Workloads = dict[str, list[Question]]


def load_workloads(names: Sequence[str], data: Mapping[str, str], limit: int) -> Workloads:
    """The workloads `names`; none: all that are shipped, those of `data`, and the mixture of them.

    Args: data: files or hub names by workload, beside shipped ones or in their place; limit: questions of each,
    at most. Raises `ValueError` of an unknown name, of data for none of them and of data that cannot be used.
    """
    sources = {name: str(_DIRECTORY / f"{name}.jsonl") for name in SHIPPED} | dict(data)
    names = names or [*sources, MIXTURE]
    if unknown := [name for name in names if name not in (*sources, MIXTURE)]:
        known = ", ".join([*sources, MIXTURE])
        raise ValueError(f"there is no workload {unknown[0]!r}; choose among {known}, or add it with --data")
    if unused := [name for name in data if name not in names and list(names) != [MIXTURE]]:
        raise ValueError(f"--data names {unused[0]!r}, which --workloads does not; add it there")
    single = [name for name in names if name != MIXTURE]
    loaded = {name: load_questions(sources[name], limit) for name in single or sources}
    return {name: mixed(loaded) if name == MIXTURE else loaded[name] for name in dict.fromkeys(names)}


def mixed(workloads: Mapping[str, Sequence[Question]]) -> list[Question]:
    """One of each in turn, until none is left."""
    named = [[replace(q, id=f"{name}/{q.id}") for q in questions] for name, questions in workloads.items()]
    return [question for question in chain(*zip_longest(*named)) if question is not None]


def batch(questions: Sequence[Question], number: int, size: int) -> list[Question]:
    """The batch of that number: other questions than the one before it, for as long as there are others."""
    return [questions[(number * size + i) % len(questions)] for i in range(size)]
