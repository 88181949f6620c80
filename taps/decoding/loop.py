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

from taps.context import Context
from taps.decoding.panel import Panel
from taps.decoding.policy import Policy, Step
from taps.decoding.sessions import VerifierSession
from taps.peers import PeerBusy, PeerGone

# Wait before another verifier is tried, doubled each time: eight tries span the restart of a replica.
_FAILOVER_DELAY_S = 0.2
_MOST_FAILOVERS = 8
_WINDOW = 16  # tokens that plain decoding may be ahead of what is delivered


async def decode(
    context: Context,
    open_verifier: Callable[[], AbstractAsyncContextManager[VerifierSession]],
    panel: Panel,
    policy: Policy,
    clock: Callable[[], float] = time.perf_counter,
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
                async for step in _decode_on(verifier, context, panel, policy, clock):
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
    verifier: VerifierSession, context: Context, panel: Panel, policy: Policy, clock: Callable[[], float]
) -> AsyncGenerator[Step, None]:
    """Decode on one verifier session, fresh at the start."""
    started = clock()
    verdict = await verifier.prefill(context.state(), context.feature_window, policy.begins_asking)
    context.restart(verdict)
    step = Step(verdict, True, 0.0, (clock() - started) * 1e3, numerics=verifier.numerics)
    policy.observe(context, step, ())
    yield step
    pass_s = math.inf  # unknown before the first
    is_ahead, held, rest = False, None, 0
    while True:
        started = drafted = clock()
        lookup = panel.lookup
        drafts = () if lookup is None else lookup.owners
        lookup = lookup if lookup is not None and policy.looks else None
        if is_ahead and rest:
            rest -= 1
            verdicts = await verifier.ahead(_WINDOW, lookup)
        else:
            free = await panel.at_hand(context, policy.ask)
            plan = policy.plan(context, panel.idle(), free) if held is None else held.among(panel.idle())
            is_plain = plan.is_plain or (panel.is_empty and not plan.tells_all)  # nobody to wait for
            # Drafters begin from features, which come when plain decoding stops, or before the first tree.
            can_ask = context.is_complete or not plan.asks
            held = None if can_ask else plan
            if is_ahead or is_plain or not context.is_complete:
                await panel.propose(context, plan.questions if is_plain and can_ask else {})
                is_ahead = is_plain and can_ask
                verdicts = await verifier.ahead(_WINDOW if is_ahead else 0, lookup)
                rest = plan.rest
            else:
                trees = free + await panel.propose(context, plan.questions, pass_s)
                tree = policy.compose(trees, context.root)
                drafted, drafts = clock(), tree.owners[1:]
                verdicts = [await verifier.verify(tree)]
                pass_s = clock() - drafted
        # Several verdicts that came together waited alike.
        passes = max(sum(verdict.num_passes for verdict in verdicts), 1)
        draft_ms, verify_ms = 1e3 * (drafted - started) / passes, 1e3 * (clock() - drafted) / passes
        for verdict in verdicts:
            context.extend(verdict)
            if verdict.tokens:
                waits = draft_ms * verdict.num_passes, verify_ms * verdict.num_passes
                checked = verdict.checked
                owners = drafts[: verdict.num_nodes] if checked is None else checked.owners[1:]
                step = Step(verdict, False, *waits, owners, why=policy.explain())
                policy.observe(context, step, panel.take_arrived())
                yield step
