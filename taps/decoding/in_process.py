"""Verifier and drafters in this process: training, evaluation and tests decode through them.

The deployments serve the very same objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager

from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Drafter
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier


@contextmanager
def in_process(
    target: Target, drafters: Iterable[tuple[str, Drafter]], num_threads: int
) -> Iterator[tuple[BatchedVerifier, list[BatchedDrafter]]]:
    """The target with so many threads and the named drafters with one each, closed when the block ends."""
    with ExitStack() as stack:
        verifier = stack.enter_context(closing(BatchedVerifier(target, num_threads)))
        panel = [BatchedDrafter(name, drafter, num_threads=1) for name, drafter in drafters]
        yield verifier, [stack.enter_context(closing(drafter)) for drafter in panel]
