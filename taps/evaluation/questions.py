"""Benchmark questions: from FastChat's files, from the benchmarks' own formats, from the hub, or your own.

What the assistant says in a row is not used: the target answers every turn itself. Knows what rows ask; nothing
of models.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from taps.recording.conversations import (
    EXPECTED,
    ID_FIELDS,
    Conversation,
    Unusable,
    refuse_half_characters,
    used_rows,
)
from taps.recording.rows import InvalidData, Row, file_rows, hub_rows

# Where the benchmarks live on the Hugging Face hub: dataset, configuration, split.
HUB = {
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math_500": ("HuggingFaceH4/MATH-500", None, "test"),
    "svamp": ("ChilleD/SVAMP", None, "test"),
    "humaneval": ("openai/openai_humaneval", None, "test"),
}


class InvalidQuestions(InvalidData):
    """Questions that cannot be asked; the message says why and what is expected."""


@dataclass(frozen=True)
class Question:
    id: str
    turns: tuple[str, ...]  # user messages, asked one after the other
    system: str | None = None  # None: as the target's chat template has it

    @property
    def opening(self) -> list[dict[str, str]]:
        """The messages before the first turn."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    @property
    def first_turn(self) -> list[dict[str, str]]:
        """The messages up to the first of the turns."""
        return [*self.opening, {"role": "user", "content": self.turns[0]}]


def load_questions(source: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a file in any form that prompts have, or of a benchmark on the hub by its name in `HUB`.

    With `limit`, so many of them evenly spread over all: benchmarks are ordered by category. Rows that cannot
    be used are left out, and counted on standard output. Raises `InvalidData`.
    """
    questions = list(used_rows(_rows(source), str(source), _question))
    if twice := [name for name, count in Counter(q.id for q in questions).items() if count > 1]:
        raise InvalidQuestions(
            f"{source} holds two questions with the id {twice[0]}; give them ids of their own"
        )
    if not questions:
        raise InvalidQuestions(f"{source} holds no questions; {EXPECTED}")
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _rows(source: str | Path) -> Iterator[Row]:
    if Path(source).is_file():
        return file_rows(Path(source))
    if str(source) not in HUB:
        raise InvalidQuestions(f"{source} is neither a file nor one of {', '.join(HUB)}")
    dataset, configuration, split = HUB[str(source)]
    return hub_rows(dataset, split, configuration)


def _question(row: Row, asked: Conversation) -> Question:
    """Raises `Unusable`."""
    first, *others = asked.messages
    system = first["content"] if first["role"] == "system" else None
    if any(message["role"] == "system" for message in others):
        raise Unusable("more than one system message, or one after the first turn")
    turns = tuple(message["content"] for message in asked.messages if message["role"] == "user")
    if not all(turn.strip() for turn in turns):
        raise Unusable("a turn in which the user says nothing")
    row_id = next(
        (str(row.value[key]) for key in ID_FIELDS if row.value.get(key) is not None), str(row.num_before)
    )
    refuse_half_characters(row_id, system or "", *turns)
    return Question(row_id, turns, system)


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 of what is asked, so that results tell whether they are of the same questions."""
    asked = [{name: value for name, value in asdict(q).items() if value is not None} for q in questions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
