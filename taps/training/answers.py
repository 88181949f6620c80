"""The target's own answers to training prompts, generated in batches and kept as resumable shards.

A drafter learns best from what the target would say, so answers are generated here by the same loop that
serves requests. Knows prompts and shards; nothing of draft heads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from taps.composing import merged
from taps.context import Context
from taps.decoding import Panel, decode
from taps.drafting.drafter import Ask
from taps.local import LocalDrafter, LocalVerifier
from taps.sampling import SamplingParams
from taps.training.shards import Recording, save_shard, shard_header, shards
from taps.training.sources import Prompt

_UNBOUNDED = 1 << 30
_PATIENT_S = 600.0  # generation waits for its drafters


@dataclass(frozen=True)
class AnswerRecipe:
    """How answers are generated."""

    answer_tokens: int = 1_000_000  # stop once this many were generated
    max_new_tokens: int = 320
    max_prompt_tokens: int = 160  # longer prompts are left out
    temperatures: tuple[float, ...] = (0.0, 0.0, 1.0)  # taken in turn
    answers_per_prompt: int = (
        8  # at most; further ones, all sampled, are asked for once the prompts are through
    )
    sessions: int = 96  # conversations decoded at once
    shard_size: int = 50  # conversations per file
    keep_features: bool = True  # else training computes them
    seed: int = 0


class _Question(NamedTuple):
    """One answer to generate."""

    id: str
    prompt: Prompt
    params: SamplingParams


class AnswerRecorder:
    """Generates answers into `directory`; what is already there is not generated again."""

    def __init__(
        self,
        verifier: LocalVerifier,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        recipe: AnswerRecipe,
        drafters: Sequence[LocalDrafter] = (),
        ask: Ask | None = None,
    ) -> None:
        """With `drafters` generation is speculative: faster where there is compute to spare, the same text."""
        self._verifier = verifier
        self._tokenizer: Any = tokenizer
        self._directory = directory
        self._recipe = recipe
        self._drafters = drafters
        self._ask = ask or Ask()
        self._unsaved: list[Recording] = []
        directory.mkdir(parents=True, exist_ok=True)
        headers = [shard_header(shard) for shard in shards(directory)]
        self._done = {row_id for header in headers for row_id in header["ids"]}
        self.num_tokens: int = sum(header["answer_tokens"] for header in headers)

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Answer prompts in order until `answer_tokens` are reached or the prompts end."""
        asyncio.run(self._run(self._questions(prompts)))

    def _questions(self, prompts: Sequence[Prompt]) -> Iterator[_Question]:
        """Every prompt once, then again and again with other noise."""
        temperatures = self._recipe.temperatures
        for turn in range(self._recipe.answers_per_prompt):
            for i, prompt in enumerate(prompts):
                row_id = f"{prompt.id}#{turn}" if turn else prompt.id
                temperature = max(temperatures) if turn else temperatures[i % len(temperatures)]
                if row_id not in self._done and (temperature or not turn):
                    choice = turn * len(prompts) + i
                    yield _Question(
                        row_id, prompt, SamplingParams(temperature, seed=self._recipe.seed, choice=choice)
                    )

    async def _run(self, questions: Iterator[_Question]) -> None:
        started, before, shown = time.monotonic(), self.num_tokens, 0.0

        async def worker() -> None:
            nonlocal shown
            for question in questions:
                if self.num_tokens >= self._recipe.answer_tokens:
                    return
                await self._answer(question)
                elapsed = time.monotonic() - started
                if elapsed - shown > 10:
                    shown = elapsed
                    rate = (self.num_tokens - before) / elapsed
                    print(f"answers: {self.num_tokens:,} tokens, {rate:.0f} tokens/s", flush=True)

        try:
            await asyncio.gather(*(worker() for _ in range(self._recipe.sessions)))
        finally:
            self._save()
        print(f"answers: {self.num_tokens:,} tokens in {self._directory}", flush=True)

    async def _answer(self, question: _Question) -> None:
        template = self._tokenizer.apply_chat_template(
            list(question.prompt.messages), add_generation_prompt=True
        )
        ids: list[int] = template["input_ids"]
        if len(ids) > self._recipe.max_prompt_tokens:
            return
        context = Context(ids, _UNBOUNDED)
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
        self.num_tokens += length - len(ids)
        if len(self._unsaved) >= self._recipe.shard_size:
            self._save()

    def _answer_length(self, context: Context) -> int | None:
        """Tokens of the answer if it has ended: at the end token or the limit, whichever comes first."""
        answer = context.tokens[context.prompt_length :]
        eos = self._tokenizer.eos_token_id
        ended = answer.index(eos) + 1 if eos in answer else len(answer) + 1
        length = min(ended, self._recipe.max_new_tokens)
        return length if length <= len(answer) else None

    def _save(self) -> None:
        if self._unsaved:
            save_shard(self._directory / f"shard-{len(shards(self._directory)):05d}.safetensors", self._unsaved)
            self._unsaved = []
