"""Log-probabilities: the target's own, whoever drafts; shown as OpenAI shows them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
import torch

from deployments.logprobs import TokenTexts, in_chat, in_completion
from deployments.openai import Piece, Writer
from taps.adaptive.policy import Fleet
from taps.composing import STRATEGIES, off
from taps.context import Context
from taps.decoding.in_process import decode_in_process
from taps.decoding.sessions import ServedDrafter
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Ask
from taps.engine.verifier import BatchedVerifier
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.verdict import TokenLogprob
from tests.prompts import PROMPTS
from tests.test_exactness import GREEDY, AtHand, Strategy, following, questions
from tests.test_openai import events

NEW_TOKENS, MOST = 16, 3
SAMPLED = SamplingParams(temperature=0.8, top_k=30, seed=5)


async def told(
    prompt: tuple[int, ...], params: SamplingParams, verifier: BatchedVerifier,
    drafters: Sequence[ServedDrafter], strategy: Strategy, num_logprobs: int | None = MOST,
) -> tuple[list[int], list[TokenLogprob]]:  # fmt: skip
    """The tokens of an answer, and what is told of them."""
    context = Context(SessionState(prompt, sampling=params, num_logprobs=num_logprobs), 512)
    found: list[TokenLogprob] = []
    with following(strategy, Ask(6, 3, 3, params), [drafter.name for drafter in drafters]) as policy:
        async with aclosing(decode_in_process(context, verifier, drafters, policy)) as steps:
            async for step in steps:
                found += step.verdict.logprobs
                if context.num_generated >= NEW_TOKENS:
                    break
    return context.tokens[len(prompt) :][:NEW_TOKENS], found[:NEW_TOKENS]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_they_are_the_targets_own_whoever_drafts(
    params: SamplingParams, tokenizer: Any, reference: Any, verifier: BatchedVerifier,
    drafters: list[BatchedDrafter],
) -> None:  # fmt: skip
    prompt = questions(tokenizer, PROMPTS[:1], [params])[0].prompt
    tokens, plain = asyncio.run(told(prompt, params, verifier, [], off))
    assert len(plain) == len(tokens) == NEW_TOKENS
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    if not params.greedy:
        best = (logits / params.temperature).topk(params.top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values)
    expected = logits.log_softmax(-1)
    for token, one, row in zip(tokens, plain, expected, strict=True):
        assert one.own == pytest.approx(float(row[token]), abs=2e-3)
        assert len(one.likeliest) == MOST
        assert [number for _, number in one.likeliest] == pytest.approx(
            row.topk(MOST).values.tolist(), abs=2e-3
        )
    panels: list[tuple[Strategy, list[ServedDrafter]]] = [
        (STRATEGIES["merged"], [*drafters]),
        (Fleet(), [*drafters[:2], AtHand()]),
        (off, []),
    ]
    for strategy, panel in panels:
        assert asyncio.run(told(prompt, params, verifier, panel, strategy)) == (tokens, plain)
    assert asyncio.run(told(prompt, params, verifier, [*drafters], STRATEGIES["merged"], None)) == (tokens, [])
    own = asyncio.run(told(prompt, params, verifier, [], off, 0))[1]
    assert own == [TokenLogprob(one.own, ()) for one in plain]


class Spelling:
    """A tokenizer of three ways to write a byte."""

    names = ("Hi", "\u0120there", "\u00f0\u0141\u013a", "<0x80>", "\N{SNOWMAN}")
    texts = ("Hi", " there", "\ufffd", "\ufffd", "\N{SNOWMAN}\ufffd")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens, "a special token is told, too"
        return self.texts[token_ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]


def test_a_token_is_told_with_its_bytes_also_where_it_is_half_a_character() -> None:
    (*shown,) = (one.own.bytes for one in TokenTexts(Spelling()).tell(range(5), [TokenLogprob(0.0, ())] * 5))
    assert [bytes(one) for one in shown] == [
        b"Hi", b" there", "\N{GRINNING FACE}".encode()[:3], b"\x80", "\N{SNOWMAN}\ufffd".encode()
    ]  # fmt: skip


def test_the_embedded_targets_tokens_have_their_bytes(tokenizer: Any) -> None:
    text = "Caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{GRINNING FACE}\n\t\N{CJK UNIFIED IDEOGRAPH-4E2D} end"
    tokens = tokenizer(text)["input_ids"]
    told_all = TokenTexts(tokenizer).tell(tokens, [TokenLogprob(-1.0, ())] * len(tokens))
    assert b"".join(bytes(one.own.bytes) for one in told_all).decode() == text
    assert any("\ufffd" in one.own.text for one in told_all)


def test_both_forms() -> None:
    logprobs = [TokenLogprob(-0.5, ((1, -0.25), (0, -0.5))), TokenLogprob(-float("inf"), ())]
    shown = TokenTexts(Spelling()).tell([0, 1], logprobs)
    hi = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    there = {"token": " there", "logprob": -0.25, "bytes": list(b" there")}
    assert in_chat(shown) == {
        "content": [
            {**hi, "top_logprobs": [there, hi]},
            {**there, "logprob": -9999.0, "top_logprobs": []},
        ],
        "refusal": None,
    }
    assert in_completion(shown, 10) == {
        "tokens": ["Hi", " there"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{" there": -0.25, "Hi": -0.5}, {}],
        "text_offset": [10, 12],
    }
    assert in_completion(TokenTexts(Spelling()).tell([0], [TokenLogprob(-1.0, ())]), 0)["top_logprobs"] is None


def test_chunks_tell_the_tokens_of_their_step() -> None:
    shown = TokenTexts(Spelling()).tell([0, 1], [TokenLogprob(-1.0, ())] * 2)
    chat, completion = Writer("chat", "m"), Writer("completion", "m")
    pieces = Piece("Hi", told=shown[:1]), Piece(" there", told=shown[1:]), Piece("!")
    choices = [chunk["choices"][0] for chunk in events(chat, *pieces)]
    assert choices[0]["delta"] == {"role": "assistant", "content": "Hi"}
    assert [one["token"] for one in choices[0]["logprobs"]["content"]] == ["Hi"]
    assert choices[2]["logprobs"] is None
    offsets = [chunk["choices"][0]["logprobs"] for chunk in events(completion, *pieces)]
    assert [told and told["text_offset"] for told in offsets] == [[0], [2], None]
