"""Benchmark questions: from FastChat's files, from the benchmarks' own formats, from the hub, or your own.

Knows rows; nothing of models.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Where the benchmarks live on the Hugging Face hub: dataset, configuration, split.
HUB = {
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math_500": ("HuggingFaceH4/MATH-500", None, "test"),
    "svamp": ("ChilleD/SVAMP", None, "test"),
    "humaneval": ("openai/openai_humaneval", None, "test"),
}
_EXPECTED = (
    'expected {"question_id": 1, "turns": ["..."]} (FastChat), {"messages": [...]}, or a row of GSM8K '
    '("question"), MATH-500 ("problem"), SVAMP ("Body", "Question"), HumanEval or MT-Bench ("prompt")'
)
_IDS = ("question_id", "id", "unique_id", "task_id", "ID", "prompt_id")


class InvalidQuestions(ValueError):
    """Questions that cannot be read; the message says which row and what is expected."""


@dataclass(frozen=True)
class Question:
    id: str
    turns: tuple[str, ...]  # user messages, asked one after the other


def load_questions(source: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a JSONL file, or of a benchmark on the hub by its name in `HUB`.

    With `limit`, so many of them evenly spread over all: benchmarks are ordered by category.
    """
    rows: Iterable[tuple[Any, str]]
    if Path(source).is_file():
        rows = _file_rows(Path(source))
    elif str(source) in HUB:
        rows = _hub_rows(str(source))
    else:
        raise InvalidQuestions(f"{source} is neither a file nor one of {', '.join(HUB)}")
    questions = [_parse(row, number, where) for number, (row, where) in enumerate(rows)]
    if twice := [name for name, count in Counter(q.id for q in questions).items() if count > 1]:
        raise InvalidQuestions(
            f"{source} holds two questions with the id {twice[0]}; give them ids of their own"
        )
    if not questions:
        raise InvalidQuestions(f"{source} holds no questions; {_EXPECTED}")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _file_rows(path: Path) -> Iterator[tuple[Any, str]]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield json.loads(line), where
                except json.JSONDecodeError as error:
                    raise InvalidQuestions(f"{where}: {error}; {_EXPECTED}") from error


def _hub_rows(name: str) -> Iterator[tuple[Any, str]]:
    try:
        import datasets
    except ImportError as error:
        raise InvalidQuestions(f"to read {name} from the Hugging Face hub, pip install datasets") from error
    dataset, configuration, split = HUB[name]
    rows: Any = datasets.load_dataset(dataset, configuration, split=split, streaming=True)
    return ((row, f"{dataset}, row {number}") for number, row in enumerate(rows))


def _parse(row: Any, number: int, where: str) -> Question:
    try:
        turns = _turns(row)
        row_id = next((str(row[key]) for key in _IDS if key in row), str(number))
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidQuestions(f"{where}: {error!r}; {_EXPECTED}") from error
    if not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise InvalidQuestions(f"{where}: no text to ask; {_EXPECTED}")
    return Question(row_id, turns)


def _turns(row: Any) -> tuple[str, ...]:
    if "turns" in row:
        return (row["turns"],) if isinstance(row["turns"], str) else tuple(row["turns"])
    if "messages" in row:
        return tuple(m["content"] for m in row["messages"] if m["role"] == "user")
    if "Body" in row:
        return (row["Body"].rstrip(". ") + ". " + row["Question"],)
    text = next(row[key] for key in ("question", "problem", "prompt", "") if key in row or not key)
    return (text,) if isinstance(text, str) else tuple(text)


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked, so that results tell whether they are of the same questions."""
    asked = json.dumps([asdict(question) for question in questions])
    return hashlib.sha256(asked.encode()).hexdigest()
