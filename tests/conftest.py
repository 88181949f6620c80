"""The real parts that tests share: the embedded target in float32, the shipped heads, a Serve cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llguidance.hf import from_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from taps.adaptive.lookups import Lookups
from taps.decoding.delivery import end_tokens
from taps.drafting.batched import BatchedDrafter
from taps.drafting.eagle import EagleDrafter
from taps.drafting.ngram import NgramDrafter
from taps.engine.grammars import Grammars
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.models.causal_lm import CausalLM
from taps.models.checkpoints import load_head
from taps.models.embedded import embedded_target

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
SESSIONS = 20  # what the exactness tests decode at once
PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def target_directory() -> Path:
    return embedded_target()


@pytest.fixture(scope="session")
def tokenizer(target_directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(target_directory)


@pytest.fixture(scope="session")
def reference(target_directory: Path) -> Any:
    """The target in float32 through transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(target_directory, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def grammars(target_directory: Path, tokenizer: Any) -> Grammars:
    """What the embedded target's texts may be asked to be."""
    ends = sorted(end_tokens(str(target_directory), tokenizer))
    return Grammars(lambda: from_tokenizer(tokenizer, len(tokenizer), ends))


@pytest.fixture(scope="session")
def verifier(target_directory: Path, grammars: Grammars) -> Iterator[BatchedVerifier]:
    """The real target in float32, which texts of transformers alone can be compared with."""
    model = CausalLM.load(target_directory, torch.float32)
    target = Target(model, SESSIONS, 512, StepBudget(prefill_tokens=256, tree_nodes=160))
    verifier = BatchedVerifier(target, guesser=Lookups(), grammars=grammars)
    yield verifier
    verifier.close()


@pytest.fixture(scope="session")
def verifier_bf16(target_directory: Path, grammars: Grammars) -> Iterator[BatchedVerifier]:
    """The real target as it is served, with a budget that cuts trees."""
    model = CausalLM.load(target_directory, torch.bfloat16)
    target = Target(model, SESSIONS, 512, StepBudget(prefill_tokens=100, tree_nodes=50))
    verifier = BatchedVerifier(target, guesser=Lookups(), grammars=grammars)
    yield verifier
    verifier.close()


@pytest.fixture(scope="session")
def drafters(target_directory: Path) -> Iterator[list[BatchedDrafter]]:
    """math, chat and n-gram: three drafters of two kinds."""
    heads = [
        BatchedDrafter(
            name,
            EagleDrafter(
                load_head(PROJECT / "specialists" / name, target_directory, torch.bfloat16), 2 * SESSIONS, 512
            ),
        )
        for name in ("math", "chat")
    ]
    panel = [*heads, BatchedDrafter("ngram", NgramDrafter())]
    yield panel
    for drafter in panel:
        drafter.close()
