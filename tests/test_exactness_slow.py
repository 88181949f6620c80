"""Exactness at length: forty prompts, every composition, float32 and bfloat16. Minutes; writes its figures.

The figures go to docs/results/exactness.json, which is committed.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from taps.composing import STRATEGIES
from taps.evaluation.runner import commit
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


class Report:
    """The figures so far, on disk after every row."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, dtype: str, found: list[Divergence], asked: list[Question]) -> None:
        tokens = len(asked) * NEW_TOKENS
        divergences = [{"position": d.position, "margin": d.margin} for d in found]
        self.rows.append(
            {"what": what, "dtype": dtype, "answers": len(asked), "tokens": tokens, "divergences": divergences}
        )
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(self._header() | {"rows": self.rows}, indent=1) + "\n")

    def _header(self) -> dict[str, Any]:
        machine = platform.processor() or platform.machine()
        made_with = {"torch": torch.__version__, "machine": machine, "commit": commit()}
        return {"prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "made_with": made_with}


@pytest.fixture(scope="module")
def report() -> Report:
    return Report()


def test_float32_text_is_the_targets_own(
    reference: Any, report: Report, asked: list[Question],
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
        report.add(f"{strategy}, {num_drafters} drafters", "float32", found, asked)
        every += found
    assert all(divergence.margin < NEAR_TIE for divergence in every)
    assert len(every) <= 1 + sum(r["tokens"] for r in report.rows) // TOKENS_PER_NEAR_TIE


def test_bfloat16_diverges_only_at_near_ties(
    reference: Any, report: Report, asked: list[Question],
    target_directory: Path, drafters: list[LocalDrafter],
) -> None:  # fmt: skip
    verifier = LocalVerifier(Target(CausalLM.load(target_directory, torch.bfloat16), SESSIONS, 512))
    plain = answer_all(asked, verifier, [], STRATEGIES["off"], NEW_TOKENS)
    for strategy in ("single", "confidence", "entropy", "merged"):
        texts = answer_all(asked, verifier, rotated(drafters, 2), STRATEGIES[strategy], NEW_TOKENS)
        found = divergences(reference, asked, texts, plain)
        report.add(f"{strategy}, 2 drafters", "bfloat16", found, asked)
        assert all(divergence.margin < BFLOAT16_NEAR_TIE for divergence in found)
    verifier.close()
