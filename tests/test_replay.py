"""Replay gives exactly what live decoding gives, and resumes what was recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import astuple, replace

import torch

from taps.composing import STRATEGIES, Compose, concatenated
from taps.context import Context
from taps.decoding.in_process import decode_in_process
from taps.decoding.metrics import SpeculationCounts
from taps.decoding.policy import Fixed
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Ask, Drafter
from taps.drafting.eagle import EagleDrafter
from taps.drafting.ngram import NgramDrafter
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.evaluation.replay import Strategy, replay
from taps.models.causal_lm import CausalLM
from taps.recording.shards import Recording
from taps.session import SessionState
from taps.shaping import SamplingParams
from tests.tiny import VOCAB, tiny_head, tiny_target

NEW_TOKENS = 40
PARAMS = SamplingParams(temperature=0.05, seed=3)
PROMPT = torch.randint(1, VOCAB, (9,), generator=torch.Generator().manual_seed(4)).tolist()


def make_drafters() -> list[Drafter]:
    return [EagleDrafter(tiny_head()), NgramDrafter(min_ngram=1)]


async def live(
    drafters: Sequence[BatchedDrafter], compose: Compose, ask: Ask
) -> tuple[SpeculationCounts, Recording]:
    counts, context = SpeculationCounts(), Context(SessionState(tuple(PROMPT), sampling=PARAMS), 1 << 20)
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 1, 256, StepBudget(tree_nodes=64)))
    steps = decode_in_process(context, verifier, drafters, Fixed(compose, ask))
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


def test_replay_counts_what_live_decoding_counts() -> None:
    """Of all strategies and sizes at once: they share the widest trees, and each comes by other positions."""
    ask = Ask(num_nodes=12, depth=3, top_k=3, sampling=PARAMS)
    sizes = dict.fromkeys(("single", "confidence", "entropy", "merged"), (12, 5)) | {"every node": (23,)}
    composed = STRATEGIES | {"every node": lambda trees, root, _: concatenated(trees, root)}
    strategies = [Strategy(name, (0, 1), composed[name], size) for name in sizes for size in sizes[name]]
    lived = {}
    for name, _, _, size in map(astuple, strategies):
        local = [BatchedDrafter(f"d{i}", d) for i, d in enumerate(make_drafters())]
        asked = replace(ask, num_nodes=min(size, ask.num_nodes))
        lived[name, size] = asyncio.run(live(local, composed[name], asked))
    recording = lived["single", 12][1]
    (replayed,) = replay(make_drafters(), [recording], [ask], strategies)
    for walk in replayed.walks:
        counts, recorded = lived[walk.strategy.name, walk.strategy.num_nodes]
        assert torch.equal(recorded.tokens, recording.tokens)
        assert walk.counts.num_tokens == counts.num_tokens == NEW_TOKENS - 1
        assert walk.counts.num_passes == counts.num_passes
        assert walk.counts.accepted_lengths == counts.accepted_lengths
        assert walk.counts.accepted_at == counts.accepted_at
        assert counts.num_accepted > 0
    assert len({walk.counts.num_passes for walk in replayed.walks}) > 2, "they part"
    assert all(walk.done for walk in replayed.walks)


def test_trees_are_grown_only_where_a_strategy_comes_by() -> None:
    """The text repeats itself, so that whole drafts are accepted and their positions passed over."""
    recording = Recording("r", torch.tensor([1, 2, 3, 4] * 6), 8, torch.zeros(23, 1))
    ask = Ask(num_nodes=4, depth=3, top_k=1)
    strategy = Strategy("ngram", (0,), STRATEGIES["single"], 4)
    for recordings in ([recording], [recording, recording]):
        for replayed in replay([NgramDrafter()], recordings, [ask] * len(recordings), [strategy]):
            assert list(replayed.trees[0]) == [9, 13, 17, 21]
            assert replayed.walks[0].counts.num_passes == 4
