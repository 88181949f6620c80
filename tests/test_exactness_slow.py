"""Exactness at length: forty prompts, every composition, float32 and bfloat16. Minutes; writes its figures.

The figures go to docs/results/exactness.json, which is committed.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from taps.composing import STRATEGIES
from taps.local import LocalDrafter, LocalVerifier
from taps.models.causal_lm import CausalLM
from taps.target import Target
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
    answer_all,
    divergences,
    generate,
    questions,
    rotated,
)

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "exactness.json"
NEW_TOKENS = int(os.environ.get("TAPS_EXACTNESS_TOKENS", "64"))
BFLOAT16_NEAR_TIE = 0.25  # nats: logits of about 20 have a spacing of 0.125 there


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Question]:
    return questions(tokenizer, PROMPTS, SAMPLINGS)


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {
        "prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "rows": [],
    }  # fmt: skip
    yield found
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def row(what: str, dtype: str, found: list[Divergence], asked: list[Question]) -> dict[str, Any]:
    return {
        "what": what, "dtype": dtype, "answers": len(asked), "tokens": len(asked) * NEW_TOKENS,
        "divergences": [{"position": d.position, "margin": d.margin} for d in found],
    }  # fmt: skip


def test_float32_text_is_the_targets_own(
    reference: Any, report: dict[str, Any], asked: list[Question],
    verifier: LocalVerifier, drafters: list[LocalDrafter],
) -> None:  # fmt: skip
    sampled = [question for question in asked if question.params != GREEDY]
    generated = [generate(reference, q.prompt, NEW_TOKENS) for q in asked if q.params == GREEDY]
    # `questions` puts the greedy ones first.
    plain = [*generated, *answer_all(sampled, verifier, [], STRATEGIES["off"], NEW_TOKENS)]
    every: list[Divergence] = []
    for strategy, num_drafters in COMPOSITIONS:
        texts = answer_all(asked, verifier, rotated(drafters, num_drafters), STRATEGIES[strategy], NEW_TOKENS)
        found = divergences(reference, asked, texts, plain)
        report["rows"].append(row(f"{strategy}, {num_drafters} drafters", "float32", found, asked))
        every += found
    assert all(divergence.margin < NEAR_TIE for divergence in every)
    assert len(every) <= 1 + sum(r["tokens"] for r in report["rows"]) // TOKENS_PER_NEAR_TIE


def test_bfloat16_diverges_only_at_near_ties(
    reference: Any, report: dict[str, Any], asked: list[Question],
    target_directory: Path, drafters: list[LocalDrafter],
) -> None:  # fmt: skip
    verifier = LocalVerifier(Target(CausalLM.load(target_directory, torch.bfloat16), SESSIONS, 512))
    plain = answer_all(asked, verifier, [], STRATEGIES["off"], NEW_TOKENS)
    for strategy in ("single", "confidence", "entropy", "merged"):
        texts = answer_all(asked, verifier, rotated(drafters, 2), STRATEGIES[strategy], NEW_TOKENS)
        found = divergences(reference, asked, texts, plain)
        report["rows"].append(row(f"{strategy}, 2 drafters", "bfloat16", found, asked))
        assert all(divergence.margin < BFLOAT16_NEAR_TIE for divergence in found)
    verifier.close()
