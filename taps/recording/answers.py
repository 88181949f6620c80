"""The target's own answers to prompts: which are recorded, which are missing, and whose they are.

Knows prompts, their tokens and shards; nothing of how answers are generated.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from taps.recording.shards import ShardRow, load_tokens, shard_header, shard_rows, shards
from taps.recording.sources import ANSWER_MARK, InvalidData, Prompt
from taps.shaping import SamplingParams


@dataclass(frozen=True)
class AnswerRecipe:
    """How answers are generated."""

    answer_tokens: int = 1_000_000  # stop once this many were generated
    max_new_tokens: int = 320
    max_prompt_tokens: int = 512  # longer prompts are left out
    temperatures: tuple[float, ...] = (0.0, 0.0, 1.0)  # taken in turn
    answers_per_prompt: int = (
        8  # at most; further ones, all sampled, are asked for once the prompts are through
    )
    sessions: int = 96  # conversations decoded at once
    shard_size: int = 50  # conversations per file
    keep_features: bool = True  # else training computes them
    seed: int = 0

    @property
    def decisive(self) -> dict[str, Any]:
        """What a conversation's answer depends on (JSON)."""
        return {
            "max_new_tokens": self.max_new_tokens, "temperatures": list(self.temperatures), "seed": self.seed,
        }  # fmt: skip


class Question(NamedTuple):
    """One answer to generate."""

    id: str
    prompt: Prompt
    params: SamplingParams
    is_gap: bool  # a later one is recorded: it was being answered when a run was killed


class LeftOut(Exception):
    """A prompt that is not answered, and why."""


def answer_sampling(row_id: str, temperature: float, seed: int) -> SamplingParams:
    """How the answer `row_id` is sampled: its noise depends on its own id, not on what else is answered."""
    return SamplingParams(temperature, seed=seed, choice=zlib.crc32(row_id.encode()))


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt as the target sees it. Raises `InvalidData` where its chat template refuses it."""
    try:
        ids: list[int] = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True)[
            "input_ids"
        ]
    except TemplateError as error:  # about roles and their order
        raise InvalidData(f"the target's chat template refuses the prompt {prompt.id}: {error}") from error
    return ids


def fitting_tokens(tokenizer: Any, prompt: Prompt, recipe: AnswerRecipe) -> list[int]:
    """The prompt as the target sees it. Raises `LeftOut` where it is not to be answered."""
    try:
        ids = prompt_tokens(tokenizer, prompt)
    except InvalidData as error:
        raise LeftOut(str(error.__cause__)) from error
    if len(ids) > recipe.max_prompt_tokens:
        raise LeftOut(f"more than {recipe.max_prompt_tokens} tokens")
    return ids


def _fits(tokenizer: Any, prompt: Prompt, recipe: AnswerRecipe) -> bool:
    try:
        fitting_tokens(tokenizer, prompt, recipe)
    except LeftOut:
        return False
    return True


def unanswered(
    directory: Path, tokenizer: Any, prompts: Sequence[Prompt], recipe: AnswerRecipe
) -> Iterator[Question]:
    """What is not recorded: every prompt once, then again and again with other noise.

    Those before the last recorded one come first: a killed run had begun them.
    """
    asked: list[tuple[str, Prompt, float]] = []
    temperatures = recipe.temperatures
    for turn in range(recipe.answers_per_prompt):
        for i, prompt in enumerate(prompts):
            row_id = f"{prompt.id}{ANSWER_MARK}{turn}" if turn else prompt.id
            temperature = max(temperatures) if turn else temperatures[i % len(temperatures)]
            if temperature or not turn:
                asked.append((row_id, prompt, temperature))
    done = {name for shard in shards(directory) for name in shard_header(shard)["ids"]}
    left = [i for i, (row_id, _, _) in enumerate(asked) if row_id not in done]
    last = max((i for i, (row_id, _, _) in enumerate(asked) if row_id in done), default=-1)
    gaps = [i for i in left if i < last and _fits(tokenizer, asked[i][1], recipe)]
    if len(gaps) > recipe.sessions + recipe.shard_size:  # more than one can have had: prompts were added since
        gaps = []
    for i in dict.fromkeys([*gaps, *left]):
        row_id, prompt, temperature = asked[i]
        yield Question(row_id, prompt, answer_sampling(row_id, temperature, recipe.seed), i in gaps)


def is_complete(directory: Path, tokenizer: Any, prompts: Sequence[Prompt], recipe: AnswerRecipe) -> bool:
    """Whether all answers are recorded that an unbroken run makes: enough of them, and none missing between."""
    enough = num_answered(directory, prompts) >= recipe.answer_tokens
    left = unanswered(directory, tokenizer, prompts, recipe)
    return not any(q.is_gap or (not enough and _fits(tokenizer, q.prompt, recipe)) for q in left)


def left_out(
    directory: Path, tokenizer: Any, prompts: Sequence[Prompt], recipe: AnswerRecipe
) -> dict[str, set[str]]:
    """Ids of the prompts without an answer that are not to be answered, by reason."""
    reasons: dict[str, set[str]] = {}
    for question in unanswered(directory, tokenizer, prompts, recipe):
        try:
            fitting_tokens(tokenizer, question.prompt, recipe)
        except LeftOut as error:
            reasons.setdefault(str(error), set()).add(question.prompt.id)
    return reasons


def num_answered(directory: Path, prompts: Sequence[Prompt]) -> int:
    """Tokens of the recorded answers to these prompts."""
    asked = {prompt.id for prompt in prompts}
    rows = (row for path in shards(directory) for row in shard_rows(path))
    return sum(row.num_answer_tokens for row in rows if row.prompt[0] in asked)


def refuse_other_target(directory: Path, made_by: str) -> None:
    """Raise `InvalidData` where `directory` holds answers of another target. Args: made_by: a fingerprint."""
    for path in shards(directory):
        if shard_header(path).get("target") not in (made_by, "", None):
            raise _others(directory, "of another target")


def _others(directory: Path, which: str) -> InvalidData:
    return InvalidData(f"{directory} holds answers {which}; give another directory, or remove it")


def refuse_other_answers(
    directory: Path, made_by: str, tokenizer: Any, prompts: Sequence[Prompt], recipe: AnswerRecipe
) -> None:
    """Raise `InvalidData` where `directory` holds answers of another target, otherwise made, or to prompts that
    have only their ids in common with these.
    """
    refuse_other_target(directory, made_by)
    asked = {prompt.id: prompt for prompt in prompts}
    for path in shards(directory):
        answering = shard_header(path).get("answering") or recipe.decisive
        for name, value in recipe.decisive.items():
            if (made_with := answering.get(name, value)) != value:
                raise _others(directory, f"made with {name} {made_with}, not {value}")
        for row in shard_rows(path):
            prompt = asked.get(row.prompt[0])
            if prompt is None:
                continue
            if load_tokens(row)[: row.answer_start].tolist() != prompt_tokens(tokenizer, prompt):
                raise _others(directory, f"to another prompt with the id {prompt.id}")


class Answers(NamedTuple):
    """A directory of recorded answers, or the first `tokens` answer tokens of it."""

    directory: Path
    tokens: int | None = None
    prompts: tuple[str, ...] | None = None  # only answers to these, in this order

    def rows(self) -> list[ShardRow]:
        """The recordings, in the order of `prompts` or else in the order they were made.

        Raises `InvalidData` where there are none, or not as many answer tokens as wanted of all prompts.
        """
        taken, tokens = [], 0
        recorded = [row for path in shards(self.directory) for row in shard_rows(path)]
        if self.prompts is not None:
            place = {name: i for i, name in enumerate(self.prompts)}
            known = [row for row in recorded if row.prompt[0] in place]
            recorded = sorted(known, key=lambda row: (row.prompt[1], place[row.prompt[0]]))
        for row in recorded:
            if self.tokens is not None and tokens >= self.tokens:
                break
            taken.append(row)
            tokens += row.num_answer_tokens
        if not taken:
            raise InvalidData(f"no recorded answers in {self.directory}; record some with `taps answer`")
        if self.prompts is None and tokens < (self.tokens or 0):
            raise InvalidData(
                f"{self.directory} holds {tokens:,} answer tokens, {self.tokens:,} were asked for"
            )
        return taken
