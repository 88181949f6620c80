"""Drafting with a head: batched growth with a cache equals the plain recomputation of every path."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from taps.context import ContextDelta
from taps.drafting import growth
from taps.drafting.drafter import RESERVED_ROWS, Ask, DraftJob, InvalidAsk
from taps.drafting.eagle import EagleDrafter
from taps.engine.threads import computing_with
from taps.models.alignment import Alignment
from taps.models.cpu_kernel.build import machine_levels
from taps.models.cpu_kernel.kernel import CpuKernel
from taps.models.draft_head import DraftHead, draft_config
from taps.models.drafting_head import DraftingHead
from taps.models.kernel_operations import KernelOperations
from taps.sampling import gumbel_noise
from taps.shaping import SamplingParams
from taps.tree import ROOT, ProposalTree
from tests.tiny import HIDDEN, VOCAB, tiny_config, tiny_head
from tests.waits import counting_waits

ASK = Ask(num_nodes=24, depth=3, top_k=4)
TOKENS = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1))
FEATURES = torch.randn(39, HIDDEN, generator=torch.Generator().manual_seed(2))


def delta(known: int, end: int, feature_start: int | None = None) -> ContextDelta:
    start = max(known - 1, 0) if feature_start is None else feature_start
    return ContextDelta(known, tuple(TOKENS[known:end].tolist()), start, FEATURES[start : end - 1])


def propose(drafter: EagleDrafter, session: object, news: ContextDelta, ask: Ask = ASK) -> ProposalTree:
    outcome = drafter.step([DraftJob(session, news, ask)])[0]
    assert isinstance(outcome, ProposalTree)
    return outcome


def path_logprob(
    head: DraftHead, end: int, path: tuple[int, ...], noise: SamplingParams | None = None
) -> float:
    """Cumulative log q of a drafted path, one uncached forward per token."""
    tokens, features, total = TOKENS[1:end].tolist(), FEATURES[: end - 1], 0.0
    with torch.inference_mode():
        for depth, token in enumerate(path):
            ids = torch.tensor([tokens])
            hidden = head(ids, features[None], torch.arange(len(tokens))[None], Alignment())[0, -1]
            logits = head.lm_head(hidden)
            if noise is not None:
                ids = head.draft_vocab.long()
                logits = logits / noise.temperature + gumbel_noise(noise.seed, 0, end + depth, ids).float()
            total += float(logits.log_softmax(-1)[token])
            tokens, features = [*tokens, token], torch.cat([features, hidden[None]])
    return total


@pytest.mark.parametrize("noise", [None, SamplingParams(temperature=0.8, seed=5)])
def test_scores_are_the_heads_own_log_probabilities(noise: SamplingParams | None) -> None:
    head = tiny_head()
    drafter = EagleDrafter(tiny_head())
    ask = Ask(ASK.num_nodes, ASK.depth, ASK.top_k, noise)
    tree = propose(drafter, drafter.open(), delta(0, 12), ask).check()
    assert max(tree.depths) > 1
    for node in range(1, len(tree)):
        expected = path_logprob(head, 12, tree.token_path(node), noise)
        assert tree.scores[node] == pytest.approx(expected, abs=2e-4)


def test_the_roots_children_are_the_likeliest_tokens() -> None:
    drafter = EagleDrafter(tiny_head())
    tree = propose(drafter, drafter.open(), delta(0, 12), Ask(num_nodes=5, depth=1, top_k=4))
    every = sorted(range(VOCAB), key=lambda t: -path_logprob(tiny_head(), 12, (t,)))
    firsts = [tree.tokens[i] for i in tree.children[ROOT]]
    assert firsts == every[: len(firsts)]


def test_a_session_that_grows_drafts_like_a_fresh_one() -> None:
    drafter = EagleDrafter(tiny_head())
    session = drafter.open()
    for known, end in ((0, 8), (8, 11), (11, 12), (12, 20)):
        grown = propose(drafter, session, delta(known, end))
    fresh = propose(drafter, drafter.open(), delta(0, 20))
    assert grown.tokens == fresh.tokens
    assert grown.scores == pytest.approx(fresh.scores, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sessions_drafted_together_get_what_they_get_alone(dtype: torch.dtype) -> None:
    """In bfloat16 many candidates tie."""
    drafter = EagleDrafter(tiny_head().to(dtype))
    asks = (
        ASK,
        Ask(num_nodes=6, depth=1, top_k=2),
        Ask(num_nodes=1, depth=2, top_k=9),
        Ask(num_nodes=20, depth=2, top_k=3, sampling=SamplingParams(temperature=0.7, seed=4)),
        Ask(num_nodes=12, depth=4, top_k=3),
        Ask(num_nodes=150, depth=1, top_k=VOCAB + 20),
        Ask(num_nodes=9, depth=0, top_k=30, sampling=SamplingParams(temperature=0.0)),
    )
    ends = (9, 15, 30, 12, 9, 21, 33)
    alone = [propose(drafter, drafter.open(), delta(0, e), a) for e, a in zip(ends, asks, strict=True)]
    jobs = [DraftJob(drafter.open(), delta(0, e), a) for e, a in zip(ends, asks, strict=True)]
    for one, other in zip(alone, drafter.step(jobs), strict=True):
        assert one == other


@pytest.mark.parametrize("level", machine_levels())
@pytest.mark.parametrize("seed", range(6))
def test_trees_grown_in_one_call_are_those_grown_level_by_level(
    seed: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, with and without noise, in sessions that grow: in bfloat16 many candidates tie."""
    draw, kernel = random.Random(seed), CpuKernel(level)
    operations = KernelOperations(kernel, torch.bfloat16)
    monkeypatch.setattr("taps.models.drafting_head.cpu_operations", lambda *_: operations)
    monkeypatch.setattr("taps.models.drafting_head.cpu_best", lambda: kernel.find_best)
    config = tiny_config()
    config.head_dim = 16
    ends_of_head = torch.randn(2, VOCAB, HIDDEN, generator=torch.Generator().manual_seed(seed))
    vocabulary = torch.tensor(sorted(draw.sample(range(VOCAB), 40)))
    inputs, outputs = ends_of_head
    head = DraftHead(draft_config(config), inputs, outputs, vocabulary).eval().to(torch.bfloat16)
    assert EagleDrafter(deepcopy(head))._head.grows

    def drawn_ask() -> Ask:
        sampling = draw.choice([None, SamplingParams(0.0), SamplingParams(seed=draw.randrange(99), choice=1)])
        depth, top_k = draw.randint(0, 6), draw.choice([1, 2, 3, 4, 8, 60])
        return Ask(draw.randint(1, 60), min(depth, RESERVED_ROWS // top_k), top_k, sampling)

    ends = [sorted(draw.sample(range(2, 40), 3)) for _ in range(draw.randint(1, 6))]
    rounds = [[(0 if i == 0 else end[i - 1], end[i], drawn_ask()) for end in ends] for i in range(3)]

    def grown() -> list[Any]:
        drafter = EagleDrafter(deepcopy(head))
        sessions = [drafter.open() for _ in ends]
        found = []
        for asked in rounds:
            jobs = [
                DraftJob(session, delta(known, end), ask)
                for session, (known, end, ask) in zip(sessions, asked, strict=True)
            ]
            found += drafter.step(jobs)
        return found

    at_once = grown()
    monkeypatch.setattr(DraftingHead, "grows", False)
    assert grown() == at_once


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_tree_with_its_entropies_does_not_depend_on_who_shares_the_step(num_threads: int) -> None:
    """Of a vocabulary so large that threads share one row's work."""
    config = tiny_config()
    config.vocab_size = 40_000
    ends = torch.randn(2, config.vocab_size, HIDDEN, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    drafter = EagleDrafter(DraftHead(draft_config(config), *ends).eval(), max_sessions=20, max_len=512)
    with computing_with(num_threads):
        alone = [propose(drafter, drafter.open(), delta(0, end)) for end in range(5, 15)]
        together = drafter.step([DraftJob(drafter.open(), delta(0, end), ASK) for end in range(5, 15)])
    assert together == alone


def test_the_host_waits_no_oftener_for_more_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a level, to read the candidates, whatever the sessions ask for."""
    reads = []
    read = growth._read

    def counted(values: Tensor) -> Any:
        reads.append(values.shape)
        return read(values)

    monkeypatch.setattr(growth, "_read", counted)
    drafter = EagleDrafter(tiny_head())
    asks = [Ask(num_nodes=200, depth=3, top_k=2 + i % 3) for i in range(8)]
    counts = []
    for number in (1, 2, 8):
        jobs = [DraftJob(drafter.open(), delta(0, 9 + i), ask) for i, ask in enumerate(asks[:number])]
        reads.clear()
        with counting_waits() as waits:
            drafter.step(jobs)
        assert len(reads) == 4
        counts.append(waits.count)
        for job in jobs:
            drafter.close(job.session)
    assert counts == [0] * 3


@pytest.mark.parametrize(
    ("news", "ask"),
    [
        (ContextDelta(0, (1, VOCAB, 2), 0, FEATURES[:2]), ASK),
        (ContextDelta(0, (1, -1, 2), 0, FEATURES[:2]), ASK),
        (ContextDelta(0, (), 0, FEATURES[:0]), ASK),
        (ContextDelta(0, (1, 2, 3), 0, FEATURES[:2, :7]), ASK),
        (ContextDelta(0, (1, 2, 3), 0, FEATURES[:5]), ASK),
        (ContextDelta(0, (1, 2, 3), 2, FEATURES[:0]), ASK),
        (ContextDelta(0, (1, 2, 3), 2, torch.empty(0, 0)), ASK),
        (ContextDelta(8, (1, 2), 0, FEATURES[:9]), ASK),
        (delta(0, 12), Ask(num_nodes=8, depth=99, top_k=4)),
        (delta(0, 12), Ask(num_nodes=8, depth=2, top_k=0)),
        (delta(0, 12), Ask(num_nodes=0, depth=2, top_k=2)),
    ],
)
def test_a_job_that_cannot_be_drafted_fails_alone(news: ContextDelta, ask: Ask) -> None:
    drafter = EagleDrafter(tiny_head())
    session = drafter.open()
    jobs = [
        DraftJob(drafter.open(), delta(0, 9), ASK),
        DraftJob(session, news, ask),
        DraftJob(drafter.open(), delta(0, 15), ASK),
    ]
    first, broken, last = drafter.step(jobs)
    assert isinstance(broken, InvalidAsk)
    for end, tree in ((9, first), (15, last)):
        assert isinstance(tree, ProposalTree)
        assert tree.tokens == propose(drafter, drafter.open(), delta(0, end)).tokens
    assert len(propose(drafter, session, delta(0, 12))) == ASK.num_nodes, "its session goes on"


def test_a_late_joiner_starts_from_a_window_of_features() -> None:
    """RoPE is relative: a window drafts like a sequence that began there."""
    drafter = EagleDrafter(tiny_head())
    session = drafter.open()
    late = propose(drafter, session, delta(0, 30, feature_start=20))
    shifted = ContextDelta(0, tuple(TOKENS[20:30].tolist()), 0, FEATURES[20:29])
    assert late.tokens == propose(drafter, drafter.open(), shifted).tokens
    assert len(propose(drafter, session, delta(30, 33))) == ASK.num_nodes


def test_news_that_do_not_join_start_the_session_anew() -> None:
    drafter = EagleDrafter(tiny_head())
    session = drafter.open()
    propose(drafter, session, delta(0, 8))
    gap = propose(drafter, session, delta(8, 30, feature_start=20))
    shifted = ContextDelta(0, tuple(TOKENS[20:30].tolist()), 0, FEATURES[20:29])
    assert gap.tokens == propose(drafter, drafter.open(), shifted).tokens


def test_a_sequence_beyond_the_cache_goes_on_from_its_newest_part() -> None:
    drafter = EagleDrafter(tiny_head(), max_sessions=1, max_len=192 + 16)
    session = drafter.open()
    for end in range(8, 40, 4):
        tree = propose(drafter, session, delta(end - 4 if end > 8 else 0, end))
        assert len(tree) == ASK.num_nodes


def test_only_the_draft_vocabulary_is_proposed() -> None:
    vocabulary = torch.tensor([2, 3, 5, 7, 11, 13])
    drafter = EagleDrafter(tiny_head(draft_vocab=vocabulary))
    tree = propose(drafter, drafter.open(), delta(0, 12))
    assert set(tree.tokens[1:]) <= set(vocabulary.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drafts_follow_the_bias_that_the_target_will_have(temperature: float, dtype: torch.dtype) -> None:
    """Whatever the draft vocabulary; others that share the step draft as without it."""
    vocabulary = torch.tensor([2, 3, 5, 7, 11, 13])
    drafter = EagleDrafter(tiny_head(draft_vocab=vocabulary).to(dtype))
    sampling = SamplingParams(temperature=temperature, seed=3, logit_bias=((4, 90.0), (11, 80.0)))
    jobs = [DraftJob(drafter.open(), delta(0, 12), ask) for ask in (replace(ASK, sampling=sampling), ASK)]
    biased, other = drafter.step(jobs)
    assert isinstance(biased, ProposalTree)
    best = biased.children[ROOT][0]
    assert biased.tokens[best] == 11
    assert biased.scores[best] == pytest.approx(0.0, abs=1e-6)
    assert other == propose(drafter, drafter.open(), delta(0, 12))


def test_drafts_are_timed_by_sessions_and_leave_none_behind() -> None:
    drafter = EagleDrafter(tiny_head(), max_sessions=4)
    for _ in range(2):
        seconds = drafter.profile()
        assert list(seconds) == [1, 4]
        assert all(0.0 < taken < 10.0 for taken in seconds.values())
    assert len([drafter.open() for _ in range(4)]) == 4
