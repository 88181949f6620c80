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
from transformers import AutoModelForCausalLM

from taps.composing import STRATEGIES
from taps.local import LocalDrafter, LocalVerifier
from taps.models.causal_lm import CausalLM
from taps.sampling import SamplingParams
from taps.target import Target
from tests.divergence import Divergence, first_divergence
from tests.prompts import PROMPTS
from tests.test_exactness import COMPOSITIONS, GREEDY, SAMPLED, encode, generate_all

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "exactness.json"
NEW_TOKENS = int(os.environ.get("TAPS_EXACTNESS_TOKENS", "64"))
BATCH = 8
FLOAT32_MARGIN = 1e-4  # nats; at most one first divergence per 50,000 tokens
BFLOAT16_MARGIN = 0.25  # nats: logits of about 20 have a spacing of 0.125 there


@pytest.fixture(scope="module")
def reference(target_directory: Path) -> Any:
    """The target in float32 through transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(target_directory, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {
        "prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(), "rows": [],
    }  # fmt: skip
    yield found
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def decode_all(
    tokenizer: Any, verifier: LocalVerifier, drafters: list[LocalDrafter],
    strategy: str, params: SamplingParams,
) -> list[tuple[int, ...]]:  # fmt: skip
    """All prompts, some at a time."""
    texts: list[tuple[int, ...]] = []
    for start in range(0, len(PROMPTS), BATCH):
        batch = PROMPTS[start : start + BATCH]
        compose = STRATEGIES[strategy]
        texts += generate_all(tokenizer, verifier, drafters, compose, params, batch, NEW_TOKENS)
    return texts


def divergences(
    reference: Any, tokenizer: Any, params: SamplingParams,
    ours: list[tuple[int, ...]], theirs: list[tuple[int, ...]],
) -> list[Divergence]:  # fmt: skip
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    found = [
        first_divergence(reference, prompt, a, b, params)
        for prompt, a, b in zip(prompts, ours, theirs, strict=True)
    ]
    return [divergence for divergence in found if divergence is not None]


def row(name: str, params: SamplingParams, found: list[Divergence]) -> dict[str, Any]:
    return {
        "what": name, "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k,
        "penalised": params.penalised, "tokens": len(PROMPTS) * NEW_TOKENS,
        "divergences": [{"position": d.position, "margin": d.margin} for d in found],
    }  # fmt: skip


def test_float32_text_is_the_targets_own(
    reference: Any, report: dict[str, Any], tokenizer: Any,
    verifier: LocalVerifier, drafters: list[LocalDrafter],
) -> None:  # fmt: skip
    generated = []
    for prompt in PROMPTS:
        ids = torch.tensor([encode(tokenizer, prompt)])
        theirs = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        generated.append(tuple(theirs[0, ids.shape[1] :].tolist()))
    plain = {GREEDY: generated}
    for params in SAMPLED:
        plain[params] = decode_all(tokenizer, verifier, [], "off", params)
    every: list[Divergence] = []
    tokens = 0
    for strategy, num_drafters in COMPOSITIONS:
        for params in (GREEDY, *SAMPLED):
            texts = decode_all(tokenizer, verifier, drafters[:num_drafters], strategy, params)
            found = divergences(reference, tokenizer, params, texts, plain[params])
            report["rows"].append(row(f"float32 {strategy} {num_drafters}", params, found))
            every += found
            tokens += len(PROMPTS) * NEW_TOKENS
    assert all(divergence.margin < FLOAT32_MARGIN for divergence in every)
    assert len(every) <= 1 + tokens // 50_000


def test_bfloat16_diverges_only_at_near_ties(
    reference: Any, report: dict[str, Any], tokenizer: Any,
    target_directory: Path, drafters: list[LocalDrafter],
) -> None:  # fmt: skip
    model = CausalLM.load(target_directory, torch.bfloat16)
    verifier = LocalVerifier(Target(model, max_sessions=8, max_len=1024))
    for params in (GREEDY, SAMPLED[1]):
        plain = decode_all(tokenizer, verifier, [], "off", params)
        texts = decode_all(tokenizer, verifier, drafters[:2], "merged", params)
        found = divergences(reference, tokenizer, params, texts, plain)
        report["rows"].append(row("bfloat16 merged 2", params, found))
        assert all(divergence.margin < BFLOAT16_MARGIN for divergence in found)
    verifier.close()
