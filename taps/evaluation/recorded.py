"""The target's run on a benchmark, recorded once: every turn of every question, and how it was sampled.

Knows questions and recordings; nothing of heads or strategies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from taps.drafting.drafter import PAPER_ASK
from taps.evaluation.questions import InvalidQuestions, Question
from taps.models.pretrained import load_tokenizer
from taps.recording.answers import AnswerRecipe, answer_sampling
from taps.recording.recorder import answer_prompts
from taps.recording.shards import Recording, load_shard, shards
from taps.recording.sources import Prompt
from taps.shaping import SamplingParams

_UNBOUNDED = 1 << 20
_MAX_PROMPT = 1024  # tokens


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured on which questions."""

    benchmark: str
    questions: int
    new_tokens: int  # per turn
    temperature: float
    seed: int
    num_nodes: int = PAPER_ASK.num_nodes  # of every tree, root included
    depth: int = PAPER_ASK.depth
    top_k: int = PAPER_ASK.top_k
    batch_size: int = 16


class Run(NamedTuple):
    """One recorded turn of a question, and the sampling it was recorded with."""

    question: str
    recording: Recording
    params: SamplingParams


def record(target: str, questions: Sequence[Question], work: Path, plan: EvaluationPlan) -> list[Run]:
    """The target's answers to every turn of every question; those `work` holds are not generated again.

    Raises `InvalidQuestions` where none can be answered.
    """
    tokenizer: Any = load_tokenizer(target)
    recipe = AnswerRecipe(
        answer_tokens=_UNBOUNDED, max_new_tokens=plan.new_tokens, max_prompt_tokens=_MAX_PROMPT,
        temperatures=(plan.temperature,), answers_per_prompt=1, sessions=plan.batch_size, seed=plan.seed,
    )  # fmt: skip
    runs: list[Run] = []
    said = {question.id: question.opening for question in questions}
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [question for question in questions if turn < len(question.turns)]
        for question in asked:
            said[question.id].append({"role": "user", "content": question.turns[turn]})
        prompts = [Prompt(question.id, tuple(said[question.id])) for question in asked]
        directory = work / f"turn-{turn + 1}"
        answer_prompts(target, prompts, directory, recipe)
        answered = {r.id: r for path in shards(directory) for r in load_shard(path)}
        for question in asked:
            if (recording := answered.get(question.id)) is not None:
                params = answer_sampling(question.id, plan.temperature, plan.seed)
                runs.append(Run(question.id, recording, params))
                answer = recording.tokens[recording.answer_start :].tolist()
                text = tokenizer.decode(answer, skip_special_tokens=True)
                said[question.id].append({"role": "assistant", "content": text})
    if not runs:
        raise InvalidQuestions(f"none of the questions can be answered within {_MAX_PROMPT} prompt tokens")
    return runs
