"""Benchmark questions in FastChat's format, and recorded runs of the target on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


class InvalidQuestions(ValueError):
    """A question file that cannot be read; the message says which line and what is expected."""


@dataclass(frozen=True)
class Question:
    id: str
    turns: tuple[str, ...]  # user messages, asked one after the other


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a JSONL file with rows {"question_id", "turns": ["...", ...]}."""
    questions: list[Question] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(questions) >= limit:
                break
            try:
                row = json.loads(line)
                questions.append(Question(str(row["question_id"]), tuple(row["turns"])))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InvalidQuestions(
                    f'{path}, line {number}: {error!r}; expected {{"question_id": 1, "turns": ["..."]}}'
                ) from error
    return questions
