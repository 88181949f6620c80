"""The central invariant on the real target: drafters decide speed, the target alone decides text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from taps.composing import STRATEGIES, Compose, concatenated, off
from taps.context import Context
from taps.decoding import Panel, decode
from taps.drafting.drafter import Ask
from taps.local import LocalDrafter, LocalVerifier
from taps.sampling import SamplingParams
from tests.prompts import PROMPTS as ALL_PROMPTS

PROMPTS = ALL_PROMPTS[:4]
NEW_TOKENS = 32
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = (
    SamplingParams(temperature=0.7, seed=11),
    SamplingParams(temperature=1.0, seed=12),
    SamplingParams(temperature=1.0, top_p=0.9, seed=13),
    SamplingParams(temperature=1.0, top_k=40, presence_penalty=0.5, frequency_penalty=0.5, seed=14),
)
COMPOSITIONS = list(product(("single", "confidence", "entropy", "merged"), (1, 2, 3)))


def encode(tokenizer: Any, prompt: str) -> list[int]:
    templated = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids: list[int] = templated["input_ids"]
    return ids


async def generate(
    prompt: Sequence[int],
    verifier: LocalVerifier,
    drafters: Sequence[LocalDrafter],
    compose: Compose,
    params: SamplingParams,
    new_tokens: int = NEW_TOKENS,
) -> tuple[int, ...]:
    context = Context(prompt, 512)
    ask = Ask(num_nodes=8, depth=3, top_k=3, sampling=params)
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(d.session(i)) for i, d in enumerate(drafters)]
        steps = decode(context, lambda: verifier.session(params), Panel(sessions, 60.0), compose, ask)
        async with aclosing(steps):
            async for _ in steps:
                if context.num_generated >= new_tokens:
                    break
    return tuple(context.tokens[len(prompt) :][:new_tokens])


def generate_all(
    tokenizer: Any,
    verifier: LocalVerifier,
    drafters: Sequence[LocalDrafter],
    compose: Compose,
    params: SamplingParams,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
) -> list[tuple[int, ...]]:
    """All prompts at once: their passes are shared."""

    async def run() -> list[tuple[int, ...]]:
        encoded = [encode(tokenizer, prompt) for prompt in prompts]
        return await asyncio.gather(
            *(generate(ids, verifier, drafters, compose, params, new_tokens) for ids in encoded)
        )

    return asyncio.run(run())


@pytest.fixture(scope="module")
def plain(tokenizer: Any, verifier: LocalVerifier) -> dict[SamplingParams, list[tuple[int, ...]]]:
    """Our plain decoding, per sampling."""
    return {params: generate_all(tokenizer, verifier, [], off, params) for params in (GREEDY, *SAMPLED)}


def test_plain_greedy_decoding_equals_transformers_generate(
    target_directory: Path,
    tokenizer: Any,
    plain: dict[SamplingParams, list[tuple[int, ...]]],
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(target_directory, dtype=torch.float32)
    for prompt, ours in zip(PROMPTS, plain[GREEDY], strict=True):
        ids = torch.tensor([encode(tokenizer, prompt)])
        # Decoding goes on after an end token here: where to stop is the router's business.
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=1, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert ours == tuple(theirs[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(("strategy", "num_drafters"), COMPOSITIONS)
def test_greedy_text_is_the_targets_own(
    strategy: str,
    num_drafters: int,
    tokenizer: Any,
    verifier: LocalVerifier,
    drafters: list[LocalDrafter],
    plain: dict[SamplingParams, list[tuple[int, ...]]],
) -> None:
    chosen, compose = drafters[:num_drafters], STRATEGIES[strategy]
    assert generate_all(tokenizer, verifier, chosen, compose, GREEDY) == plain[GREEDY]


@pytest.mark.parametrize(
    ("strategy", "num_drafters", "params"),
    [(*composition, SAMPLED[i % len(SAMPLED)]) for i, composition in enumerate(COMPOSITIONS)],
)
def test_sampled_text_equals_plain_sampling_with_the_same_seed(
    strategy: str,
    num_drafters: int,
    params: SamplingParams,
    tokenizer: Any,
    verifier: LocalVerifier,
    drafters: list[LocalDrafter],
    plain: dict[SamplingParams, list[tuple[int, ...]]],
) -> None:
    chosen, compose = drafters[-num_drafters:], STRATEGIES[strategy]
    assert generate_all(tokenizer, verifier, chosen, compose, params) == plain[params]


def test_duplicate_proposals_and_the_concatenated_merge_change_no_text(
    tokenizer: Any,
    verifier: LocalVerifier,
    drafters: list[LocalDrafter],
    plain: dict[SamplingParams, list[tuple[int, ...]]],
) -> None:
    twice = [drafters[0], drafters[0], drafters[1]]
    for params in (GREEDY, SAMPLED[1]):
        assert generate_all(tokenizer, verifier, twice, concatenated, params) == plain[params]
