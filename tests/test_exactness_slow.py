"""Exactness at length: forty prompts, every composition, float32 and bfloat16. Minutes; writes its figures.

The figures go to docs/results/exactness-float32.json and -bfloat16.json, which are committed.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taps.composing import STRATEGIES
from taps.drafting.batched import BatchedDrafter
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.models.attention import PackedStep, Segment
from taps.models.cache import SlotCache
from taps.models.causal_lm import CausalLM
from taps.provenance import commit
from tests.conftest import SESSIONS
from tests.divergence import Divergence
from tests.prompts import PROMPTS
from tests.test_exactness import (
    COMPOSITIONS,
    GREEDY,
    NEAR_TIE,
    SAMPLINGS,
    TOKENS_PER_NEAR_TIE,
    Question,
    Text,
    answer_all,
    divergences,
    generate,
    questions,
    rotated,
)

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
NEW_TOKENS = int(os.environ.get("TAPS_EXACTNESS_TOKENS", "64"))


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Question]:
    return questions(tokenizer, PROMPTS, SAMPLINGS)


class Report:
    """The figures so far of one precision, on disk after every row."""

    def __init__(self, dtype: str, **measured: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = RESULTS / f"exactness-{dtype}.json"
        machine = platform.processor() or platform.machine()
        made_with = {"torch": torch.__version__, "machine": machine, "commit": commit()}
        self._header = {"dtype": dtype, "prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, **measured}
        self._header["made_with"] = made_with

    def add(self, what: str, found: list[Divergence], asked: list[Question]) -> None:
        tokens = len(asked) * NEW_TOKENS
        divergences = [{"position": d.position, "margin": d.margin} for d in found]
        self.rows.append({"what": what, "answers": len(asked), "tokens": tokens, "divergences": divergences})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._header | {"rows": self.rows}, indent=1) + "\n")


def test_float32_text_is_the_targets_own(
    reference: Any, asked: list[Question], verifier: BatchedVerifier, drafters: list[BatchedDrafter]
) -> None:
    report = Report("float32")
    sampled = [question for question in asked if question.params != GREEDY]
    generated = [generate(reference, q.prompt, NEW_TOKENS) for q in asked if q.params == GREEDY]
    # `questions` puts the greedy ones first.
    plain = [*generated, *answer_all(sampled, verifier, [], STRATEGIES["off"], NEW_TOKENS)]
    every: list[Divergence] = []
    for strategy, num_drafters in COMPOSITIONS:
        texts = answer_all(asked, verifier, rotated(drafters, num_drafters), STRATEGIES[strategy], NEW_TOKENS)
        found = divergences(reference, asked, texts, plain)
        report.add(f"{strategy}, {num_drafters} drafters", found, asked)
        every += found
    assert all(divergence.margin < NEAR_TIE for divergence in every)
    assert len(every) <= 1 + sum(r["tokens"] for r in report.rows) // TOKENS_PER_NEAR_TIE


def difference_error(reference: Any, model: CausalLM, answered: list[tuple[Question, Text]]) -> Tensor:
    """By how much `model` misjudges how far the two likeliest tokens lie apart, at every answered token. [n]"""
    errors = []
    for question, text in answered:
        tokens = [*question.prompt, *text]
        cache = SlotCache(1, len(tokens))
        whole = Segment(cache.acquire(), 0, torch.arange(len(tokens)), None)
        wanted = range(len(question.prompt) - 1, len(tokens) - 1)
        step = PackedStep(cache, [whole], model.dtype, model.device)
        ours = model.extend(tokens, step, wanted)[1].float()
        with torch.inference_mode():
            exact = reference(torch.tensor([tokens]), use_cache=False).logits[0, list(wanted)]
        best = exact.topk(2).indices
        apart = ours.gather(1, best) - exact.gather(1, best)
        errors.append((apart[:, 0] - apart[:, 1]).abs())
    return torch.cat(errors)


def test_bfloat16_diverges_only_where_its_rounding_decides(
    reference: Any, asked: list[Question], target_directory: Path, drafters: list[BatchedDrafter]
) -> None:
    model = CausalLM.load(target_directory, torch.bfloat16)
    verifier = BatchedVerifier(Target(model, SESSIONS, 512))
    plain = answer_all(asked, verifier, [], STRATEGIES["off"], NEW_TOKENS)
    greedy = [(q, text) for q, text in zip(asked, plain, strict=True) if q.params == GREEDY]
    errors = difference_error(reference, model, greedy)
    # Two decodings part where one errs one way and the other the other way, each as far as one pass may.
    bound = 2 * float(errors.max())
    report = Report("bfloat16", error_median=float(errors.median()), error_max=float(errors.max()))
    for strategy in ("single", "confidence", "entropy", "merged"):
        texts = answer_all(asked, verifier, rotated(drafters, 2), STRATEGIES[strategy], NEW_TOKENS)
        found = divergences(reference, asked, texts, plain)
        report.add(f"{strategy}, 2 drafters", found, asked)
        assert all(divergence.margin < bound for divergence in found)
    verifier.close()
