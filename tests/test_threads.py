"""One thread of a process computes in parallel; how many others compute with stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from taps.drafting.ngram import NgramDrafter
from taps.local import LocalDrafter, LocalVerifier
from taps.models.causal_lm import CausalLM
from taps.target import Target
from taps.threads import compute_with, computing_with
from tests.tiny import tiny_target


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with computing_with(2):
        yield


async def test_steps_compute_with_their_own_number_of_threads() -> None:
    """In another order than they were made, and with torch's number changed meanwhile."""
    verifier = LocalVerifier(Target(CausalLM(tiny_target()), 1, 64), 3)
    drafter = LocalDrafter("ngram", NgramDrafter(), 1)
    try:
        assert await drafter._batcher.between_steps(torch.get_num_threads) == 1
        assert await verifier._batcher.between_steps(torch.get_num_threads) == 3
        assert await drafter._batcher.between_steps(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
    finally:
        verifier.close()
        drafter.close()


def test_the_number_before_comes_back() -> None:
    with computing_with(1) as before:
        assert (before, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2


def test_no_thread_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        compute_with(0)
    assert torch.get_num_threads() == 2
