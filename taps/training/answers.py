"""The target's own answers to training prompts, generated in batches and kept as resumable shards.

A drafter learns best from what the target would say, so answers are generated here by the same loop that
serves requests. Knows prompts and shards; nothing of draft heads.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from taps.composing import merged
from taps.context import Context
from taps.decoding import Panel, decode
from taps.drafting.drafter import Ask
from taps.local import LocalDrafter, LocalVerifier
from taps.sampling import SamplingParams
from taps.training.shards import Recording, load_tokens, save_shard, shard_header, shard_rows, shards
from taps.training.sources import ANSWER_MARK, InvalidData, Prompt

_UNBOUNDED = 1 << 30
_PATIENT_S = 600.0  # generation waits for its drafters
_PROGRESS_INTERVAL_S = 10.0


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


class _Question(NamedTuple):
    """One answer to generate."""

    id: str
    prompt: Prompt
    params: SamplingParams
    is_gap: bool  # a later one is recorded: it was being answered when a run was killed


class _LeftOut(Exception):
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


def _fitting_tokens(tokenizer: Any, prompt: Prompt, recipe: AnswerRecipe) -> list[int]:
    """The prompt as the target sees it. Raises `_LeftOut` where it is not to be answered."""
    try:
        ids = prompt_tokens(tokenizer, prompt)
    except InvalidData as error:
        raise _LeftOut(str(error.__cause__)) from error
    if len(ids) > recipe.max_prompt_tokens:
        raise _LeftOut(f"more than {recipe.max_prompt_tokens} tokens")
    return ids


def _fits(tokenizer: Any, prompt: Prompt, recipe: AnswerRecipe) -> bool:
    try:
        _fitting_tokens(tokenizer, prompt, recipe)
    except _LeftOut:
        return False
    return True


def _unanswered(
    directory: Path, tokenizer: Any, prompts: Sequence[Prompt], recipe: AnswerRecipe
) -> Iterator[_Question]:
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
        yield _Question(row_id, prompt, answer_sampling(row_id, temperature, recipe.seed), i in gaps)


def is_complete(directory: Path, tokenizer: Any, prompts: Sequence[Prompt], recipe: AnswerRecipe) -> bool:
    """Whether all answers are recorded that an unbroken run makes: enough of them, and none missing between."""
    enough = num_answered(directory, prompts) >= recipe.answer_tokens
    left = _unanswered(directory, tokenizer, prompts, recipe)
    return not any(q.is_gap or (not enough and _fits(tokenizer, q.prompt, recipe)) for q in left)


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


class AnswerRecorder:
    """Generates answers into `directory`; what is already there is not generated again."""

    def __init__(
        self,
        verifier: LocalVerifier,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        recipe: AnswerRecipe,
        end_tokens: frozenset[int],
        drafters: Sequence[LocalDrafter] = (),
        ask: Ask | None = None,
        made_by: str = "",
    ) -> None:
        """With `drafters` generation is speculative: faster where there is compute to spare, the same text.

        Args: end_tokens: ids that end an answer; made_by: the target's fingerprint, kept with its answers.
        """
        self._verifier = verifier
        self._tokenizer: Any = tokenizer
        self._directory = directory
        self._recipe = recipe
        self._end_tokens = end_tokens
        self._drafters = drafters
        self._ask = ask or Ask()
        self._made_by = made_by
        self._left_out: dict[str, set[str]] = {}  # ids of prompts, by reason
        self._answering: dict[str, Context] = {}  # by row id
        self._unsaved: list[Recording] = []
        self._num_tokens = 0

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Answer prompts in order until there are `answer_tokens` of answers to them, or they end.

        Those that an earlier run was answering when it was killed are answered in any case, so that both
        together record what one would have.

        Raises `InvalidData` while another process records into the same directory.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._directory / ".lock", timeout=0):
                self._num_tokens = num_answered(self._directory, prompts)
                asyncio.run(self._run(_unanswered(self._directory, self._tokenizer, prompts, self._recipe)))
        except Timeout as error:
            raise InvalidData(
                f"another process is recording answers into {self._directory}; wait for it, or give another "
                "directory"
            ) from error

    async def _run(self, questions: Iterator[_Question]) -> None:
        async def worker() -> None:
            for question in questions:
                if self._num_tokens >= self._recipe.answer_tokens and not question.is_gap:
                    return
                await self._answer(question)

        progress = asyncio.create_task(self._show_progress())
        try:
            await asyncio.gather(*(worker() for _ in range(self._recipe.sessions)))
        finally:
            progress.cancel()
            self._save()
        print(f"answers: {self._num_tokens:,} tokens in {self._directory}", flush=True)
        for reason, ids in self._left_out.items():
            print(f"answers: {len(ids):,} prompts were left out: {reason}", flush=True)

    async def _show_progress(self) -> None:
        """Print every few seconds how many tokens there are and at what rate they come, until cancelled."""
        started, before = time.monotonic(), self._num_tokens
        while True:
            await asyncio.sleep(_PROGRESS_INTERVAL_S)
            unfinished = sum(context.num_generated for context in self._answering.values())
            generated = self._num_tokens + unfinished
            rate = (generated - before) / (time.monotonic() - started)
            line = f"answers: {generated:,} of {self._recipe.answer_tokens:,} tokens, {rate:.0f} tokens/s"
            print(line, flush=True)

    async def _answer(self, question: _Question) -> None:
        try:
            ids = _fitting_tokens(self._tokenizer, question.prompt, self._recipe)
        except _LeftOut as error:
            self._left_out.setdefault(str(error), set()).add(question.prompt.id)
            return
        context = self._answering[question.id] = Context(ids, _UNBOUNDED)
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(d.session(i)) for i, d in enumerate(self._drafters)]
            panel = Panel(sessions, _PATIENT_S)
            ask = replace(self._ask, sampling=question.params)
            steps = decode(context, lambda: self._verifier.session(question.params), panel, merged, ask)
            async with aclosing(steps):
                async for _ in steps:
                    if (length := self._answer_length(context)) is not None:
                        break
        length = len(ids) + (length or 0)
        tokens = torch.tensor(context.tokens[:length], dtype=torch.int32)
        features = torch.empty(0, 0)
        if self._recipe.keep_features:
            features = context.since(0).features[: length - 1].to(torch.bfloat16)
        self._unsaved.append(Recording(question.id, tokens, len(ids), features))
        del self._answering[question.id]
        self._num_tokens += length - len(ids)
        if len(self._unsaved) >= self._recipe.shard_size:
            self._save()

    def _answer_length(self, context: Context) -> int | None:
        """Tokens of the answer if it has ended: at the end token or the limit, whichever comes first."""
        answer = context.tokens[context.prompt_length :]
        ended = len(answer) + 1
        if not self._end_tokens.isdisjoint(answer):
            ended = 1 + next(i for i, token in enumerate(answer) if token in self._end_tokens)
        length = min(ended, self._recipe.max_new_tokens)
        return length if length <= len(answer) else None

    def _save(self) -> None:
        if self._unsaved:
            there = shards(self._directory)
            number = int(there[-1].stem.removeprefix("shard-")) + 1 if there else 0
            path = self._directory / f"shard-{number:05d}.safetensors"
            save_shard(path, self._unsaved, self._made_by, self._recipe.decisive)
            self._unsaved = []
