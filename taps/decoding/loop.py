"""The decoding loop: propose, compose, verify (which accepts and commits), deliver.

Drafters and verifiers are two small async protocols; whether they live in this process or on another
machine is not known here. Plain decoding is the same loop without drafters.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from taps.composing import Compose
from taps.context import Context
from taps.decoding.panel import Panel
from taps.decoding.sessions import VerifierSession
from taps.drafting.drafter import Ask
from taps.peers import PeerBusy, PeerGone
from taps.verdict import Verdict

# Wait before another verifier is tried, doubled each time: eight tries span the restart of a replica.
_FAILOVER_DELAY_S = 0.2
_MOST_FAILOVERS = 8
_WINDOW = 16  # tokens that plain decoding may be ahead of what is delivered


@dataclass(frozen=True)
class Step:
    """What one turn of the loop delivered."""

    verdict: Verdict
    is_prefill: bool
    draft_ms: float  # waiting for drafters
    verify_ms: float  # waiting for the verifier
    drafted: tuple[int, ...] = ()  # owner bits of the drafted nodes that were checked
    numerics: str = ""  # of the verifier, at a prefill


async def decode(
    context: Context,
    open_verifier: Callable[[], AbstractAsyncContextManager[VerifierSession]],
    panel: Panel,
    compose: Compose,
    ask: Ask,
) -> AsyncGenerator[Step, None]:
    """Decode until the caller closes the generator (`contextlib.aclosing` frees the verifier's session).

    `context` holds the prompt. When the verifier is lost, what was decided so far is prefilled on another
    one and decoding goes on: the noise depends on positions alone, so the text is the same. Raises
    `PeerGone` after several failures in a row, and `PeerBusy` at once where nothing is decided yet.
    """
    failures = 0
    while True:
        try:
            async with open_verifier() as verifier:
                async for step in _decode_on(verifier, context, panel, compose, ask):
                    yield step
                    if not step.is_prefill:
                        failures = 0
        except PeerGone as error:
            turned_away = isinstance(error, PeerBusy) and not context.num_generated
            if turned_away or failures >= _MOST_FAILOVERS:
                raise
            await asyncio.sleep(_FAILOVER_DELAY_S * 2**failures)
            failures += 1


async def _decode_on(
    verifier: VerifierSession, context: Context, panel: Panel, compose: Compose, ask: Ask
) -> AsyncGenerator[Step, None]:
    """Decode on one verifier session, fresh at the start."""
    started = time.perf_counter()
    verdict = await verifier.prefill(context.state(), context.feature_window)
    context.restart(verdict)
    yield Step(verdict, True, 0.0, (time.perf_counter() - started) * 1e3, numerics=verifier.numerics)
    pass_s = math.inf  # unknown before the first
    is_ahead = False
    while True:
        started = time.perf_counter()
        if is_ahead or not panel.drafters:
            is_ahead = not panel.drafters  # nobody to wait for
            verdict = await verifier.ahead(_WINDOW if is_ahead else 0)
            context.extend(verdict)
            if verdict.tokens:
                yield Step(verdict, False, 0.0, (time.perf_counter() - started) * 1e3)
            continue
        trees = await panel.propose(context, ask, pass_s)
        tree = compose(trees, context.root, ask.num_nodes)
        drafted = time.perf_counter()
        verdict = await verifier.verify(tree)
        context.extend(verdict)
        verified = time.perf_counter()
        pass_s = verified - drafted
        checked = tree.owners[1 : 1 + verdict.num_nodes]
        yield Step(verdict, False, (drafted - started) * 1e3, (verified - drafted) * 1e3, checked)
