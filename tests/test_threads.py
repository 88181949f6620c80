"""One thread of a process computes in parallel; how many others compute with stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Literal

import pytest
import torch

from deployments.config import SpecialistArgs, TargetArgs, VerifierArgs
from deployments.loading import load_drafter, load_verifier
from taps.drafting.batched import BatchedDrafter
from taps.drafting.ngram import NgramDrafter
from taps.engine.target import Target
from taps.engine.threads import compute_with, computing_with
from taps.engine.verifier import BatchedVerifier
from taps.models.causal_lm import CausalLM
from taps.models.cpu_kernel.team import num_threads
from tests.tiny import tiny_target


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with computing_with(2):
        yield


async def test_steps_compute_with_their_own_number_of_threads() -> None:
    """In another order than they were made, and with torch's number changed meanwhile."""
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 1, 64), 3)
    drafter = BatchedDrafter("ngram", NgramDrafter(), 1)
    try:
        assert await drafter._batcher.between_steps(torch.get_num_threads) == 1
        assert await verifier._batcher.between_steps(torch.get_num_threads) == 3
        assert await drafter._batcher.between_steps(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
    finally:
        verifier.close()
        drafter.close()


@pytest.mark.parametrize("kind", ["verifier", "drafter"])
async def test_what_a_replica_loads_computes_in_one_thread_only(kind: str) -> None:
    """The thread that loads keeps no workers, whatever number of threads the steps were given."""
    loaded: BatchedVerifier | BatchedDrafter
    if kind == "verifier":
        loaded, _ = load_verifier(TargetArgs(), VerifierArgs(torch_threads=3))
    else:
        loaded, _ = load_drafter(SpecialistArgs(name="ngram", kind="ngram", torch_threads=3))
    with closing(loaded):
        assert await loaded._batcher.between_steps(num_threads) == 3
        assert await loaded._batcher.between_steps(torch.get_num_threads) == (1 if kind == "verifier" else 3)
        assert (torch.get_num_threads(), num_threads()) == (1, 1)


@pytest.mark.parametrize(("dtype", "threads"), [("bfloat16", 2), ("float32", 1)])
async def test_a_specialist_has_two_threads_where_the_kernel_drafts(
    dtype: Literal["bfloat16", "float32"], threads: int
) -> None:
    loaded, _ = load_drafter(SpecialistArgs(name="math", head="specialists/math", dtype=dtype))
    with closing(loaded):
        assert await loaded._batcher.between_steps(num_threads) == threads
        assert await loaded._batcher.between_steps(torch.get_num_threads) == 1


def test_the_number_before_comes_back() -> None:
    with computing_with(1) as before:
        assert (before, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2


def test_no_thread_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        compute_with(0)
    assert torch.get_num_threads() == 2


_SECONDS_BUSY_AFTER_A_STEP = """
import statistics, time
import taps, torch

torch.set_num_threads(2)
matrix = torch.ones(512, 512)

def busy():
    matrix @ matrix
    before = time.process_time()
    time.sleep(0.05)
    return time.process_time() - before

print(statistics.median(busy() for _ in range(15)))
"""


def test_threads_that_wait_leave_the_cores_to_others() -> None:
    """By default libgomp's spin for 9 ms after a pass, when drafters on the same cores begin."""
    settings = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}  # as if nothing had set them
    ran = subprocess.run(
        [sys.executable, "-c", _SECONDS_BUSY_AFTER_A_STEP],
        env={name: value for name, value in os.environ.items() if name not in settings},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert float(ran.stdout) < 0.004
