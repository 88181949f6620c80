"""The decoding loop: propose, compose, verify (which accepts and commits), deliver.

What was decided is delivered once drafters were asked for what comes next, and while they are at work.

Drafters and verifiers are two small async protocols; whether they live in this process or on another
machine is not known here. Plain decoding is the same loop without drafters.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from taps.context import Context
from taps.decoding.panel import Panel
from taps.decoding.policy import Policy, Step
from taps.decoding.sessions import VerifierSession
from taps.peers import PeerBusy, PeerGone
from taps.verdict import Verdict

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
    decided = [step]
    pass_s = math.inf  # unknown before the first
    is_ahead, held, rest = False, None, 0
    while True:
        if context.is_over:  # nobody is asked for what comes after the end
            while decided:
                yield decided.pop(0)
        started = clock()
        lookup = panel.lookup
        drafts = () if lookup is None else lookup.owners
        lookup = lookup if lookup is not None and policy.looks else None
        window = _WINDOW  # of plain decoding
        asked = None  # where a tree is checked
        if is_ahead and rest:
            rest -= 1
        else:
            free = await panel.at_hand(context, policy.ask)
            plan = policy.plan(context, panel.idle(), free) if held is None else held.among(panel.idle())
            is_plain = plan.is_plain or (panel.is_empty and not plan.tells_all)  # nobody to wait for
            # Drafters begin from features, which come when plain decoding stops, or before the first tree.
            can_ask = context.is_complete or not plan.asks
            held = None if can_ask else plan
            if is_plain and can_ask:
                panel.ask(context, plan.questions)
                is_ahead, rest = True, plan.rest
            elif is_ahead or not context.is_complete:
                is_ahead, window = False, 0
            else:
                asked = panel.ask(context, plan.questions, pass_s)
                await asked.have_gone_out()
        # What was decided is delivered while drafters are at work; that is no waiting for them.
        delivering = clock()
        while decided:
            yield decided.pop(0)
        started += clock() - delivering
        if asked is not None:
            trees = free + await panel.answers(asked, context.root)
            tree = policy.compose(trees, context.root)
            drafted, drafts = clock(), tree.owners[1:]
            verdicts: Sequence[Verdict] = [await verifier.verify(tree)]
            pass_s = clock() - drafted
        else:
            drafted = started
            verdicts = await verifier.ahead(window, lookup)
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
                decided.append(step)
