"""Training data: prompts, the target's own answers to them, and its features, as resumable shards.

A drafter learns best from what the target would say, so answers are generated here, in batches, by the
same loop that serves requests. Knows prompts and shards; nothing of draft heads.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from taps.composing import off
from taps.context import Context
from taps.decoding import Panel, decode
from taps.drafting.drafter import Ask
from taps.local import LocalVerifier
from taps.sampling import SamplingParams

_UNBOUNDED = 1 << 30


class InvalidData(ValueError):
    """Training prompts that cannot be read; the message says which line and what is allowed."""


@dataclass(frozen=True)
class Prompt:
    id: str
    messages: tuple[dict[str, str], ...]  # up to and including the last user message


@dataclass(frozen=True)
class Recording:
    """One conversation as the target decided it."""

    id: str
    tokens: Tensor  # [n] int32
    answer_start: int  # index of the first token the target generated
    features: Tensor  # [n - 1, H] bfloat16; row i belongs to tokens[i]


def load_prompts(path: str | Path, seed: int = 0) -> list[Prompt]:
    """Prompts of a `messages` JSONL file, one conversation a line, in an order shuffled by `seed`.

    Reference answers are dropped: messages after the last user message are not read.
    """
    prompts = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                prompts.append(_parse_prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise InvalidData(f"{path} holds no prompts")
    random.Random(seed).shuffle(prompts)
    return prompts


def _parse_prompt(line: str, where: str) -> Prompt:
    wanted = 'expected {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        row: Any = json.loads(line)
        messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidData(f"{where}: {error!r}; {wanted}") from error
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if not users or not all(isinstance(v, str) for m in messages for v in m.values()):
        raise InvalidData(f"{where}: no user message, or a content that is not text; {wanted}")
    return Prompt(str(row.get("id", where)), tuple(messages[: users[-1] + 1]))


@dataclass(frozen=True)
class AnswerRecipe:
    """How answers are generated."""

    answer_tokens: int = 1_000_000  # stop once this many were generated
    max_new_tokens: int = 320
    max_prompt_tokens: int = 160  # longer prompts are left out
    temperatures: tuple[float, ...] = (0.0, 0.0, 1.0)  # taken in turn
    batch_size: int = 96  # conversations decoded at once
    shard_size: int = 50  # conversations per file
    seed: int = 0


class AnswerRecorder:
    """Generates answers into `directory`; what is already there is not generated again."""

    def __init__(
        self, verifier: LocalVerifier, tokenizer: PreTrainedTokenizerBase, directory: Path, recipe: AnswerRecipe
    ) -> None:
        self._verifier = verifier
        self._tokenizer: Any = tokenizer
        self._directory = directory
        self._recipe = recipe
        self._unsaved: list[Recording] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._done = {row_id for shard in shards(directory) for row_id in shard_header(shard)["ids"]}
        self.num_tokens = sum(shard_header(shard)["answer_tokens"] for shard in shards(directory))

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Answer prompts in order until `answer_tokens` are reached or the prompts end."""
        todo = iter([(i, p) for i, p in enumerate(prompts) if p.id not in self._done])
        asyncio.run(self._run(todo))

    async def _run(self, todo: Iterator[tuple[int, Prompt]]) -> None:
        started, before, shown = time.monotonic(), self.num_tokens, 0.0

        async def worker() -> None:
            nonlocal shown
            for number, prompt in todo:
                if self.num_tokens >= self._recipe.answer_tokens:
                    return
                await self._answer(number, prompt)
                elapsed = time.monotonic() - started
                if elapsed - shown > 10:
                    shown = elapsed
                    rate = (self.num_tokens - before) / elapsed
                    print(f"answers: {self.num_tokens:,} tokens, {rate:.0f} tokens/s", flush=True)

        try:
            await asyncio.gather(*(worker() for _ in range(self._recipe.batch_size)))
        finally:
            self._save()
        print(f"answers: {self.num_tokens:,} tokens in {self._directory}", flush=True)

    async def _answer(self, number: int, prompt: Prompt) -> None:
        recipe = self._recipe
        template = self._tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True)
        ids: list[int] = template["input_ids"]
        if len(ids) > recipe.max_prompt_tokens:
            return
        temperature = recipe.temperatures[number % len(recipe.temperatures)]
        params = SamplingParams(temperature, seed=recipe.seed, choice=number)
        context = Context(ids, _UNBOUNDED)
        steps = decode(context, lambda: self._verifier.session(params), Panel(), off, Ask())
        async with aclosing(steps):
            async for _ in steps:
                ended = context.root == self._tokenizer.eos_token_id
                if ended or context.num_generated >= recipe.max_new_tokens:
                    break
        features = context.since(0).features.to(torch.bfloat16)
        self._unsaved.append(
            Recording(prompt.id, torch.tensor(context.tokens, dtype=torch.int32), len(ids), features)
        )
        self.num_tokens += context.num_generated
        if len(self._unsaved) >= recipe.shard_size:
            self._save()

    def _save(self) -> None:
        if self._unsaved:
            save_shard(self._directory / f"shard-{len(shards(self._directory)):05d}.safetensors", self._unsaved)
            self._unsaved = []


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.safetensors"))


def save_shard(path: Path, recordings: Sequence[Recording]) -> None:
    """Write recordings to one file, whole or not at all."""
    lengths = [len(r.tokens) for r in recordings]
    starts = [r.answer_start for r in recordings]
    answer_tokens = sum(lengths) - sum(starts)
    header = {"ids": [r.id for r in recordings], "answer_tokens": answer_tokens}
    tensors = {
        "tokens": torch.cat([r.tokens for r in recordings]),
        "features": torch.cat([r.features for r in recordings]),
        "lengths": torch.tensor(lengths),
        "answer_starts": torch.tensor(starts),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"header": json.dumps(header)})
    partial.rename(path)


def shard_header(path: Path) -> dict[str, Any]:
    """{"ids", "answer_tokens"} of a shard, without reading its tensors."""
    with safe_open(path, "pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["header"])
    return header


def load_shard(path: Path) -> list[Recording]:
    with safe_open(path, "pt") as file:
        ids = json.loads(file.metadata()["header"])["ids"]
        lengths = file.get_tensor("lengths").tolist()
        tokens = file.get_tensor("tokens").split(lengths)
        features = file.get_tensor("features").split([n - 1 for n in lengths])
        starts = file.get_tensor("answer_starts").tolist()
    return [Recording(*row) for row in zip(ids, tokens, starts, features, strict=True)]
