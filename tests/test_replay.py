"""Replay gives exactly what live decoding gives, and resumes what was recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing

import pytest
import torch

from taps.composing import STRATEGIES
from taps.context import Context
from taps.decoding import Panel, decode
from taps.drafting.drafter import Ask, Drafter
from taps.drafting.eagle import EagleDrafter
from taps.drafting.ngram import NgramDrafter
from taps.evaluation.replay import Strategy, grow_trees, replay
from taps.local import LocalDrafter, LocalVerifier
from taps.metrics import SpeculationCounts
from taps.models.causal_lm import CausalLM
from taps.sampling import SamplingParams
from taps.scheduling import StepBudget
from taps.target import Target
from taps.training.shards import Recording
from tests.tiny import VOCAB, tiny_head, tiny_target

NEW_TOKENS = 40
PARAMS = SamplingParams(temperature=0.05, seed=3)
PROMPT = torch.randint(1, VOCAB, (9,), generator=torch.Generator().manual_seed(4)).tolist()


def make_drafters() -> list[Drafter]:
    return [EagleDrafter(tiny_head()), NgramDrafter(min_ngram=1)]


async def live(
    drafters: Sequence[LocalDrafter], strategy: str, ask: Ask
) -> tuple[SpeculationCounts, Recording]:
    counts, context = SpeculationCounts(), Context(PROMPT, 1 << 20)
    verifier = LocalVerifier(Target(CausalLM(tiny_target()), 1, 256, StepBudget(tree_nodes=64)))
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(d.session(i)) for i, d in enumerate(drafters)]
        steps = decode(
            context, lambda: verifier.session(PARAMS), Panel(sessions, 60.0), STRATEGIES[strategy], ask
        )
        async with aclosing(steps):
            async for step in steps:
                room = NEW_TOKENS - (context.num_generated - len(step.verdict.tokens))
                if not step.is_prefill:
                    counts.observe(step.verdict, min(len(step.verdict.tokens), room))
                if context.num_generated >= NEW_TOKENS:
                    break
    end = len(PROMPT) + NEW_TOKENS
    tokens = torch.tensor(context.tokens[:end], dtype=torch.int32)
    features = context.since(0).features[: end - 1]
    return counts, Recording("live", tokens, len(PROMPT), features)


@pytest.mark.parametrize("strategy", ["single", "confidence", "merged"])
def test_replay_counts_what_live_decoding_counts(strategy: str) -> None:
    ask = Ask(num_nodes=10, depth=3, top_k=3, sampling=PARAMS)
    local = [LocalDrafter(f"d{i}", d) for i, d in enumerate(make_drafters())]
    counts, recording = asyncio.run(live(local, strategy, ask))
    trees = [grow_trees(d, [recording], [ask], i)[0] for i, d in enumerate(make_drafters())]
    replayed = replay(recording, trees, [Strategy(strategy, (0, 1), STRATEGIES[strategy], 10)])[0].counts
    assert replayed.num_tokens == counts.num_tokens == NEW_TOKENS - 1
    assert replayed.num_passes == counts.num_passes
    assert replayed.accepted_lengths == counts.accepted_lengths
    assert replayed.accepted_at == counts.accepted_at
    assert counts.num_accepted > 0
