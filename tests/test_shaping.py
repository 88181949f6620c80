"""Shaping, held against the logits processors of `transformers`: an independent implementation of each."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from taps.models.kernel_operations import cpu_best
from taps.session import SessionState
from taps.shaping import SamplingParams, logprobs_of, shape_logits, shape_rows

VOCAB, END = 64, 3
PROMPT, ANSWER = (5, 9, 5, 40, 21), (7, 9, 33, 7)
BAD_WORDS = ((11,), (33, 7, 12), (9, 9), (7, 20))

Words: TypeAlias = tuple[tuple[int, ...], ...]


def logits(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def theirs(raw: Tensor, fields: dict[str, Any], min_tokens: int, bad_words: Words) -> Tensor:
    """What `transformers` makes of the logits after the prompt and the answer so far."""
    steps = LogitsProcessorList()
    if fields.get("logit_bias"):
        steps.append(SequenceBiasLogitsProcessor([[[token], by] for token, by in fields["logit_bias"]]))
    if "repetition_penalty" in fields:
        steps.append(RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if bad_words:
        steps.append(NoBadWordsLogitsProcessor([list(word) for word in bad_words]))
    if min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, END, device="cpu"))
    if fields.get("temperature", 1.0) not in (0.0, 1.0):
        steps.append(TemperatureLogitsWarper(fields["temperature"]))
    if "top_k" in fields:
        steps.append(TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        steps.append(TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        steps.append(MinPLogitsWarper(fields["min_p"]))
    tokens: Any = torch.tensor([[*PROMPT, *ANSWER]])
    shaped: Tensor = steps(tokens, raw[None].clone())
    return shaped[0]


def ours(raw: Tensor, fields: dict[str, Any], min_tokens: int, bad_words: Words) -> Tensor:
    tokens, params = (*PROMPT, *ANSWER), SamplingParams(**fields)
    limits: dict[str, Any] = {"end_tokens": (END,), "min_tokens": min_tokens, "bad_words": bad_words}
    state = SessionState(tokens, len(ANSWER), params, **limits)
    return shape_rows(raw[None], [params], [state.counts()], [state.excluded(tokens, len(ANSWER))])[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fields", "min_tokens", "bad_words"),
    [
        ({"min_p": 0.1}, 0, ()),
        ({"min_p": 1.0}, 0, ()),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05}, 0, ()),
        ({"repetition_penalty": 1.3}, 0, ()),
        ({"repetition_penalty": 0.8, "temperature": 0.0}, 0, ()),
        ({"logit_bias": ((4, 5.0), (9, -100.0))}, 0, ()),
        ({"logit_bias": ((4, 5.0), (9, -2.5)), "repetition_penalty": 1.5, "temperature": 0.5}, 0, ()),
        ({}, len(ANSWER), ()),
        ({}, len(ANSWER) + 1, ()),
        ({}, 0, BAD_WORDS),
        ({"repetition_penalty": 1.2, "min_p": 0.02, "temperature": 1.4}, 9, BAD_WORDS),
    ],
)
def test_each_parameter_does_what_transformers_does(
    seed: int, fields: dict[str, Any], min_tokens: int, bad_words: Words
) -> None:
    raw = logits(seed)
    expected, found = theirs(raw, fields, min_tokens, bad_words), ours(raw, fields, min_tokens, bad_words)
    assert torch.equal(found.isfinite(), expected.isfinite())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_bad_words_last_token_is_excluded_only_after_the_others() -> None:
    state = SessionState((1, 2), bad_words=((7,), (2, 8), (1, 9), (1, 2, 6)))
    assert set(state.excluded((1, 2), 0)) == {7, 8, 6}
    assert set(state.excluded((2,), 0)) == {7, 8}, "fewer tokens than a word has"
    assert set(state.excluded((), 0)) == {7}


def test_a_row_does_not_depend_on_who_shares_the_operation() -> None:
    rows = torch.stack([logits(n) for n in range(4)])
    params = [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.2, min_p=0.1),
        SamplingParams(temperature=0.0, logit_bias=((1, 3.0),)),
        SamplingParams(presence_penalty=1.0, repetition_penalty=0.9),
    ]
    counts = [{}, {5: 0, 7: 2}, {}, {5: 0, 7: 2}]
    excluded = [(), (9, 11), (), (2,)]
    together = shape_rows(rows, params, counts, excluded)
    for n in range(4):
        alone = shape_rows(rows[n : n + 1], [params[n]], [counts[n]], [excluded[n]])[0]
        assert torch.equal(together[n], alone)
    assert torch.equal(together[0], rows[0])


def test_a_prompts_tokens_are_repetitions_and_nothing_else() -> None:
    """Presence and frequency count what was generated, as OpenAI has it."""
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    counts = SessionState((5, 6, 6), 1, params).counts()
    assert counts == {5: 0, 6: 1}
    raw = torch.full((8,), 4.0)
    assert shape_logits(raw, params, counts).tolist() == [4.0, 4.0, 4.0, 4.0, 4.0, 2.0, 0.5, 4.0]


def test_where_everything_is_excluded_there_is_no_token() -> None:
    shaped = shape_rows(logits(0)[None], [SamplingParams(min_p=0.5)], [{}], [range(VOCAB)])
    assert shaped.max() == -math.inf


@pytest.mark.parametrize("in_kernel", [False, True])
def test_log_probabilities_are_those_of_the_shaped_distribution(in_kernel: bool) -> None:
    raw = torch.stack([logits(n) for n in range(3)])
    params = [SamplingParams(), SamplingParams(temperature=0.5, top_k=3), SamplingParams(temperature=0.0)]
    shaped = shape_rows(raw, params, [{}] * 3, [(), (), (9,)])
    told = logprobs_of(shaped, [4, 9, 11], [0, 5, 2], cpu_best() if in_kernel else None)
    for (own, likeliest), row, token in zip(told, shaped.double(), (4, 9, 11), strict=True):
        expected = row - row.exp().sum().log()
        assert own == pytest.approx(float(expected[token]), abs=1e-5)
        assert [number for _, number in likeliest] == sorted((n for _, n in likeliest), reverse=True)
        assert all(number == pytest.approx(float(expected[t]), abs=1e-5) for t, number in likeliest)
    assert [len(likeliest) for _, likeliest in told] == [0, 3, 2], "what is cut is not among the likeliest"
    assert told[2][1][0][0] != 9
