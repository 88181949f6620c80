"""Exactness at length: forty prompts, every composition, float32 and bfloat16. Minutes; writes its figures.

The figures go to docs/results/exactness-float32.json and -bfloat16.json, which are committed.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from taps.adaptive.policy import Fleet
from taps.composing import STRATEGIES, off
from taps.decoding import loop
from taps.drafting.batched import BatchedDrafter
from taps.engine.verifier import BatchedVerifier
from taps.provenance import made_with
from taps.shaping import SamplingParams
from tests.prompts import PROMPTS
from tests.test_exactness import (
    COMPOSITIONS,
    GREEDY,
    AtHand,
    Losing,
    Question,
    Restless,
    Strategy,
    Text,
    answer_all,
    check_near_ties,
    divergences,
    generate,
    plain_alone,
    questions,
    rotated,
)

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
NEW_TOKENS = int(os.environ.get("TAPS_EXACTNESS_TOKENS", "128"))
AT_ONCE = 8
SAMPLED = SamplingParams(temperature=1.0, seed=12)


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Question]:
    return questions(tokenizer, PROMPTS, (GREEDY, SAMPLED))


class Report:
    """The figures so far of one precision, on disk after every row."""

    def __init__(self, dtype: str, verifier: BatchedVerifier) -> None:
        self._rows: list[dict[str, Any]] = []
        self._path = RESULTS / f"exactness-{dtype}.json"
        self._header = {
            "dtype": dtype,
            "numerics": verifier.target.numerics,
            "prompts": len(PROMPTS),
            "new_tokens": NEW_TOKENS,
            "compared_with": "plain decoding, one session a step, nothing reused",
            "made_with": made_with(),
        }

    def add(self, what: str, ours: Sequence[Text], plain: Sequence[Text]) -> None:
        differ = [i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b]
        self._rows.append({"what": what, "answers": len(ours), "tokens": sum(map(len, ours)), "differ": differ})
        self._path.write_text(json.dumps(self._header | {"rows": self._rows}, indent=1) + "\n")
        assert not differ, what


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_one_different_token(
    dtype: str, reference: Any, asked: list[Question], verifier: BatchedVerifier,
    verifier_bf16: BatchedVerifier, drafters: list[BatchedDrafter], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    served = verifier if dtype == "float32" else verifier_bf16
    asyncio.run(served.warm_up())
    report = Report(dtype, served)
    plain = plain_alone(asked, served, NEW_TOKENS)
    report.add("plain, eight at a time", answer_all(asked, served, [], off, NEW_TOKENS, AT_ONCE), plain)
    for strategy, num_drafters in COMPOSITIONS:
        panel = rotated(drafters, num_drafters)
        texts = answer_all(asked, served, panel, STRATEGIES[strategy], NEW_TOKENS, AT_ONCE)
        report.add(f"{strategy}, {num_drafters} drafters, eight at a time", texts, plain)
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.0)
    for what, fleet in (("adaptive", Fleet()), ("adaptive, switching at random", Fleet(Restless()))):
        texts = answer_all(asked, served, drafters, fleet, NEW_TOKENS, AT_ONCE)
        report.add(f"{what}, 3 drafters, eight at a time", texts, plain)
    for what, beside in (("adaptive, 2 drafters and lookups", drafters[:2]), ("adaptive, lookups alone", [])):
        texts = answer_all(asked, served, [*beside, AtHand()], Fleet(), NEW_TOKENS, AT_ONCE)
        report.add(f"{what}, eight at a time", texts, plain)
    mixture: list[Strategy] = [*STRATEGIES.values(), Fleet(), Fleet(Restless())]
    for what, verifier_of in (("", served), (", verifiers killed after 9 passes", Losing(served, 9))):
        texts = answer_all(asked, verifier_of, drafters, mixture, NEW_TOKENS, AT_ONCE)
        report.add(f"strategies mixed, 3 drafters, prefixes found again{what}, eight at a time", texts, plain)
    if dtype == "float32":
        greedy = asked[: len(PROMPTS)]  # `questions` puts the greedy ones first
        theirs = [generate(reference, question.prompt, NEW_TOKENS) for question in greedy]
        found = divergences(reference, greedy, plain[: len(PROMPTS)], theirs)
        check_near_ties(found, len(greedy) * NEW_TOKENS)
