"""What requests may ask for besides temperature and nuclei: with every strategy the target's own text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from taps.composing import STRATEGIES, off
from taps.decoding import loop
from taps.drafting.batched import BatchedDrafter
from taps.engine.verifier import BatchedVerifier
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from tests.prompts import PROMPTS
from tests.test_exactness import (
    EVERY,
    GREEDY,
    Losing,
    Question,
    Text,
    answer_all,
    answered_by,
    mixed,
    plain_alone,
    questions,
)

NEW_TOKENS = 20
SAMPLED = SamplingParams(temperature=0.8, seed=21)


@pytest.fixture(scope="module")
def usual(tokenizer: Any, verifier: BatchedVerifier) -> tuple[list[Question], list[Text]]:
    """Questions that ask for nothing, and their greedy text: what parameters change."""
    asked = questions(tokenizer, PROMPTS[:1], [GREEDY])
    return asked, plain_alone(asked, verifier, NEW_TOKENS)


@pytest.fixture(scope="module")
def asked(usual: tuple[list[Question], list[Text]]) -> list[Question]:
    """Of what is usual, something that each parameter forbids or asks for."""
    found = []
    for question, text in zip(*usual, strict=True):
        words = ((text[16],), (text[8], text[9]), (text[9], text[10], text[11]))
        ends = tuple(sorted({text[6], text[12]}))
        bias = ((text[5], -3.0), (text[7], -100.0), (text[15], 2.5))
        for params in (GREEDY, SAMPLED):
            found += [
                question._replace(params=replace(params, repetition_penalty=1.3)),
                question._replace(params=replace(params, logit_bias=bias)),
                question._replace(params=params, limits={"bad_words": words}),
                question._replace(params=params, limits={"end_tokens": ends, "min_tokens": NEW_TOKENS}),
                question._replace(
                    params=replace(params, repetition_penalty=0.9, logit_bias=bias, frequency_penalty=0.3),
                    limits={"bad_words": words, "end_tokens": ends, "min_tokens": NEW_TOKENS},
                ),
            ]
        found.append(question._replace(params=replace(SAMPLED, min_p=0.2)))
        found.append(question._replace(params=replace(SAMPLED, min_p=0.05, top_p=0.9, top_k=50)))
    return found


@pytest.fixture(scope="module")
def plain(asked: list[Question], verifier: BatchedVerifier) -> list[Text]:
    return plain_alone(asked, verifier, NEW_TOKENS)


@pytest.fixture(scope="module")
def plain_bf16(asked: list[Question], verifier_bf16: BatchedVerifier) -> list[Text]:
    return plain_alone(asked, verifier_bf16, NEW_TOKENS)


def generate(reference: Any, question: Question) -> Text:
    """The target's greedy text by `transformers` alone, with its own ways to forbid and to ask for tokens."""
    params, limits = question.params, question.limits
    ids = torch.tensor([question.prompt])
    generated = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        repetition_penalty=params.repetition_penalty,
        sequence_bias={(token,): by for token, by in params.logit_bias} or None,
        bad_words_ids=[list(word) for word in limits.get("bad_words", ())] or None,
        min_new_tokens=limits.get("min_tokens", 1),
        eos_token_id=list(limits["end_tokens"]) if "end_tokens" in limits else None,
    )  # fmt: skip
    return tuple(generated[0, ids.shape[1] :].tolist())


def test_greedy_text_is_what_transformers_generates(
    reference: Any, asked: list[Question], plain: list[Text]
) -> None:
    compared = 0
    for question, text in zip(asked, plain, strict=True):
        if question.params.greedy and not question.params.frequency_penalty:  # which it does not have
            assert generate(reference, question) == text
            compared += 1
    assert compared == 4


def test_every_parameter_changes_the_text_it_is_asked_to_change(
    usual: tuple[list[Question], list[Text]], asked: list[Question], plain: list[Text]
) -> None:
    """Else the tests here would compare what is usual with itself."""
    texts = {question.prompt: text for question, text in zip(*usual, strict=True)}
    for question, text in zip(asked, plain, strict=True):
        assert text != texts[question.prompt]
        for word in question.limits.get("bad_words", ()):
            everything = question.prompt[-len(word) + 1 :] + text if len(word) > 1 else text
            assert all(everything[i : i + len(word)] != word for i in range(len(everything)))
        assert not set(text) & set(question.limits.get("end_tokens", ()))


def beside_a_decoy(text: Text) -> ProposalTree:
    """The text as a chain; of the root's children it is the second."""
    nodes = [(text[1] + 1, 0, -0.1, 1), (text[1], 0, -0.2, 1)]
    nodes += [(token, n, -float(n), 1) for n, token in enumerate(text[2:], 2)]
    return ProposalTree.ordered(text[0], nodes, len(nodes) + 1)


def common(one: Text, other: Text) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_accepted_in_a_pass_counts_for_what_comes_after_it_there(
    dtype: str, usual: tuple[list[Question], list[Text]], asked: list[Question], plain: list[Text],
    plain_bf16: list[Text], verifier: BatchedVerifier, verifier_bf16: BatchedVerifier,
) -> None:  # fmt: skip
    """One pass accepts all of the right text, and of the usual one as much as is right."""
    texts, served = (plain, verifier) if dtype == "float32" else (plain_bf16, verifier_bf16)

    async def check(question: Question, text: Text, drafted: Text) -> int:
        async with served.session() as session:
            state = SessionState(question.prompt, sampling=question.params, **question.limits)
            assert (await session.prefill(state, 1)).tokens == text[:1]
            found = await session.verify(beside_a_decoy((text[0], *drafted[1:])))
            accepted = common(text[1:], drafted[1:])
            assert (len(found.owners), found.num_nodes) == (accepted, NEW_TOKENS)
            assert found.tokens[: NEW_TOKENS - 1] == text[1 : accepted + 2]
            return accepted

    for question, text in zip(asked, texts, strict=True):
        assert asyncio.run(check(question, text, text)) == NEW_TOKENS - 1
    (often,) = plain_alone(usual[0], served, NEW_TOKENS)
    pairs = zip(asked, texts, strict=True)
    accepted = {asyncio.run(check(question, text, often)) for question, text in pairs}
    assert len(accepted) > 2, "what is asked for matters early and late"


@pytest.mark.parametrize("strategy", EVERY)
def test_with_every_strategy_it_is_what_plain_decoding_gives(
    strategy: str, asked: list[Question], plain: list[Text], plain_bf16: list[Text], verifier: BatchedVerifier,
    verifier_bf16: BatchedVerifier, drafters: list[BatchedDrafter],
) -> None:  # fmt: skip
    assert answered_by(strategy, asked, verifier, drafters, NEW_TOKENS) == plain
    assert answered_by(strategy, asked, verifier_bf16, drafters, NEW_TOKENS) == plain_bf16


def test_sharing_steps_and_losing_the_verifier_changes_nothing(
    asked: list[Question], plain_bf16: list[Text], verifier_bf16: BatchedVerifier,
    drafters: list[BatchedDrafter], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whoever takes a session up counts what was generated before."""
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.0)
    assert answer_all(asked, verifier_bf16, drafters, off, NEW_TOKENS) == plain_bf16
    assert answer_all(asked, Losing(verifier_bf16, 3), drafters, mixed(), NEW_TOKENS) == plain_bf16


def test_an_end_token_may_come_once_there_are_tokens_enough(
    usual: tuple[list[Question], list[Text]], verifier: BatchedVerifier, drafters: Sequence[BatchedDrafter]
) -> None:
    """Until then the text is another one, from then on it may end."""
    question, text = usual[0][0], usual[1][0]
    end = text[10]
    first = text.index(end)
    for least in (0, first, first + 1):
        limited = question._replace(limits={"end_tokens": (end,), "min_tokens": least})
        for panel in ([], drafters):
            strategy = STRATEGIES["merged"] if panel else off
            (found,) = answer_all([limited], verifier, panel, strategy, NEW_TOKENS)
            assert (found == text[: first + 1]) == (least <= first)
            assert end not in found[:least]
