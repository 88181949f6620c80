"""Verifier and drafters in this process: training, evaluation and tests decode through them.

The deployments serve the very same objects.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, closing, contextmanager

from taps.context import Context
from taps.decoding.loop import decode
from taps.decoding.panel import Panel
from taps.decoding.policy import Policy, Step
from taps.decoding.sessions import ServedDrafter, Verifier
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Drafter
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier

_PATIENT_S = 600.0  # drafters of this process are waited for


@contextmanager
def in_process(
    target: Target, drafters: Iterable[tuple[str, Drafter]], num_threads: int
) -> Iterator[tuple[BatchedVerifier, list[BatchedDrafter]]]:
    """The target and the named drafters with so many threads, closed when the block ends.

    Drafters that torch computes have one each: its teams would stand in each other's way.
    """
    with ExitStack() as stack:
        verifier = stack.enter_context(closing(BatchedVerifier(target, num_threads)))
        panel = [BatchedDrafter(name, d, num_threads if d.in_kernel else 1) for name, d in drafters]
        yield verifier, [stack.enter_context(closing(drafter)) for drafter in panel]


async def decode_in_process(
    context: Context, verifier: Verifier, drafters: Sequence[ServedDrafter], policy: Policy
) -> AsyncGenerator[Step, None]:  # fmt: skip
    """The steps of one answer, until the caller closes the generator, which frees its sessions."""
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(d.session(i)) for i, d in enumerate(drafters)]
        panel = Panel(sessions, _PATIENT_S)
        stack.push_async_callback(panel.close)
        steps = decode(context, verifier.session, panel, policy)
        async with aclosing(steps):
            async for step in steps:
                yield step
