"""The central invariant on the real target: drafters decide speed, the target alone decides text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch

from taps.composing import STRATEGIES, Compose, concatenated, off
from taps.context import Context
from taps.decoding.in_process import decode_in_process
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Ask
from taps.engine.verifier import BatchedVerifier
from taps.sampling import SamplingParams
from tests.divergence import Divergence, first_divergence
from tests.prompts import PROMPTS

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.7, seed=11),
    SamplingParams(temperature=1.0, seed=12),
    SamplingParams(temperature=1.0, top_p=0.9, seed=13),
    SamplingParams(temperature=1.0, top_k=40, presence_penalty=0.5, frequency_penalty=0.5, seed=14),
)
COMPOSITIONS = list(product(("single", "confidence", "entropy", "merged"), (1, 2, 3)))
# Float32 logits move by about 5e-5 with the shapes of a batch, so a closer tie may fall either way.
NEAR_TIE = 1e-4  # nats
TOKENS_PER_NEAR_TIE = 50_000

Text = tuple[int, ...]


class Question(NamedTuple):
    """One answer to decode."""

    prompt: tuple[int, ...]
    params: SamplingParams


def questions(tokenizer: Any, prompts: Sequence[str], samplings: Sequence[SamplingParams]) -> list[Question]:
    """Every prompt under every sampling."""
    encoded = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in prompts
    ]
    return [Question(tuple(e["input_ids"]), params) for params in samplings for e in encoded]


def rotated(drafters: Sequence[BatchedDrafter], count: int) -> list[BatchedDrafter]:
    """`count` drafters, each count beginning with another one."""
    return [drafters[(count - 1 + i) % len(drafters)] for i in range(count)]


async def answer(
    question: Question,
    verifier: BatchedVerifier,
    drafters: Sequence[BatchedDrafter],
    compose: Compose,
    new_tokens: int,
) -> Text:
    context = Context(question.prompt, 512)
    ask = Ask(num_nodes=6, depth=3, top_k=3, sampling=question.params)
    steps = decode_in_process(context, verifier, drafters, compose, ask, question.params)
    async with aclosing(steps):
        async for _ in steps:
            if context.num_generated >= new_tokens:
                break
    return tuple(context.tokens[context.prompt_length :][:new_tokens])


def answer_all(
    asked: Sequence[Question],
    verifier: BatchedVerifier,
    drafters: Sequence[BatchedDrafter],
    compose: Compose,
    new_tokens: int = NEW_TOKENS,
    at_once: int = 20,
) -> list[Text]:
    """Answers of `new_tokens` tokens each; `at_once` sessions of every kind of sampling share their passes."""

    async def run(batch: Sequence[Question]) -> list[Text]:
        return await asyncio.gather(*(answer(q, verifier, drafters, compose, new_tokens) for q in batch))

    return [
        text
        for start in range(0, len(asked), at_once)
        for text in asyncio.run(run(asked[start : start + at_once]))
    ]


def generate(reference: Any, prompt: Sequence[int], new_tokens: int) -> Text:
    """The target's greedy text by transformers alone. It goes on after an end token, as ours does here."""
    ids = torch.tensor([prompt])
    generated = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
        min_new_tokens=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return tuple(generated[0, ids.shape[1] :].tolist())


def divergences(
    reference: Any, asked: Sequence[Question], ours: Sequence[Text], theirs: Sequence[Text]
) -> list[Divergence]:
    found = [
        first_divergence(reference, question.prompt, a, b, question.params)
        for question, a, b in zip(asked, ours, theirs, strict=True)
    ]
    return [divergence for divergence in found if divergence is not None]


class Identity:
    """Texts are identical, or part at a near-tie; of those there may be one per 50,000 tokens."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._near_ties = 0
        self._tokens = 0

    def check(self, asked: Sequence[Question], ours: Sequence[Text], theirs: Sequence[Text]) -> None:
        found = divergences(self._reference, asked, ours, theirs)
        assert all(divergence.margin < NEAR_TIE for divergence in found), found
        self._near_ties += len(found)
        self._tokens += sum(map(len, ours))
        assert self._near_ties <= 1 + self._tokens // TOKENS_PER_NEAR_TIE


@pytest.fixture(scope="module")
def identity(reference: Any) -> Identity:
    return Identity(reference)


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Question]:
    return questions(tokenizer, PROMPTS[:4], SAMPLINGS)


@pytest.fixture(scope="module")
def plain(asked: list[Question], verifier: BatchedVerifier) -> list[Text]:
    """Our plain decoding, all in one batch."""
    return answer_all(asked, verifier, [], off)


def test_plain_greedy_decoding_equals_transformers_generate(
    reference: Any, identity: Identity, asked: list[Question], plain: list[Text]
) -> None:
    greedy = [(q, text) for q, text in zip(asked, plain, strict=True) if q.params == GREEDY]
    theirs = [generate(reference, question.prompt, NEW_TOKENS) for question, _ in greedy]
    identity.check([question for question, _ in greedy], [text for _, text in greedy], theirs)


@pytest.mark.parametrize(("strategy", "num_drafters"), COMPOSITIONS)
def test_greedy_and_sampled_text_is_the_targets_own(
    strategy: str,
    num_drafters: int,
    identity: Identity,
    asked: list[Question],
    plain: list[Text],
    verifier: BatchedVerifier,
    drafters: list[BatchedDrafter],
) -> None:
    ours = answer_all(asked, verifier, rotated(drafters, num_drafters), STRATEGIES[strategy])
    identity.check(asked, ours, plain)


def test_duplicate_proposals_and_the_concatenated_merge_change_no_text(
    identity: Identity,
    asked: list[Question],
    plain: list[Text],
    verifier: BatchedVerifier,
    drafters: list[BatchedDrafter],
) -> None:
    twice = [drafters[0], drafters[0], drafters[1]]
    identity.check(asked, answer_all(asked, verifier, twice, concatenated), plain)
