"""Pages: prefixes found again give the same bits, and who waits or is paused for want of room loses nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pytest
import torch

from taps.engine.batching import BLOCKED
from taps.engine.jobs import PrefillJob, VerifyJob
from taps.engine.scheduling import StepBudget
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.models.cache import PAGE
from taps.models.causal_lm import CausalLM
from taps.models.memory import free_memory
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import Verdict
from tests.fakes import random_tree, until
from tests.tiny import VOCAB, tiny_target

MODEL = CausalLM(tiny_target())
BUDGET = StepBudget(prefill_tokens=48, tree_nodes=12)


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1, VOCAB) for _ in range(n))


def state(tokens: Sequence[int], max_tokens: int = 40, cache_salt: str = "") -> SessionState:
    sampling = SamplingParams(seed=len(tokens))
    return SessionState(tuple(tokens), 0, sampling, max_tokens, cache_salt=cache_salt)


def take_up(target: Target, asked: SessionState) -> tuple[Verdict, list[int]]:
    """The verdict of a session's prefill, and the positions from which on each step computed."""
    session, starts = target.open(), list[int]()
    job = PrefillJob(session, asked)
    while True:
        (verdict,) = target.step([job])
        if isinstance(verdict, Verdict):
            target.close(session)
            return verdict, starts
        assert verdict is None
        starts.append(session.sequence.length)


@contextmanager
def served(target: Target) -> Iterator[BatchedVerifier]:
    with closing(BatchedVerifier(target)) as verifier:
        yield verifier


async def answer(verifier: BatchedVerifier, asked: SessionState, seed: int) -> list[int]:
    """All tokens of an answer, decoded with random trees."""
    rng = random.Random(seed)
    async with verifier.session() as session:
        decided = list((await session.prefill(asked, 8)).tokens)
        while len(decided) < asked.max_tokens:
            tree = random_tree(rng, num_nodes=6, root=decided[-1], vocab_size=VOCAB)
            decided += (await session.verify(tree)).tokens
    return decided


async def answers(target: Target, asked: Sequence[SessionState]) -> list[list[int]]:
    with served(target) as verifier:
        async with asyncio.timeout(60):
            return await asyncio.gather(*(answer(verifier, one, i) for i, one in enumerate(asked)))


def test_a_prefix_that_was_computed_before_is_not_computed_again_and_gives_the_same_bits() -> None:
    target = Target(MODEL, 2, 400, BUDGET)
    cold, steps = take_up(target, state(prompt(200)))
    assert steps == [48, 96, 144, 192]
    warm, steps = take_up(target, state(prompt(200)))
    assert steps == [], "192 of 200 tokens were there"
    assert (cold.num_reused, warm.num_reused) == (0, 192)
    assert (warm.tokens, warm.owners) == (cold.tokens, cold.owners)
    assert torch.equal(warm.features, cold.features), "of all positions, reused ones too"


def test_a_prompt_of_whole_pages_computes_its_last_token_at_least() -> None:
    target = Target(MODEL, 2, 400, BUDGET)
    cold, _ = take_up(target, state(prompt(2 * PAGE)))
    warm, steps = take_up(target, state(prompt(2 * PAGE)))
    assert steps == [PAGE + 48], "the first page alone is reused"
    assert warm.tokens == cold.tokens


def test_only_the_common_prefix_is_shared_and_a_salt_keeps_it_apart() -> None:
    target = Target(MODEL, 2, 400, BUDGET)
    take_up(target, state(prompt(200)))
    changed = (*prompt(100), 1 + prompt(200)[100] % (VOCAB - 2), *prompt(200)[101:])
    assert take_up(target, state(changed))[1][0] == PAGE + 48
    assert take_up(target, state(prompt(200), cache_salt="mine"))[1][0] == 48
    assert take_up(target, state(prompt(200), cache_salt="mine"))[1] == []


async def test_a_second_turn_finds_the_answer_of_the_first() -> None:
    target = Target(MODEL, 2, 400, BUDGET)
    first = state(prompt(70), max_tokens=70)
    (text,) = await answers(target, [first])
    second = state((*first.tokens, *text, 5, 6, 7))
    assert take_up(target, second)[1] == [], "140 tokens before it, of which two pages are full"
    assert take_up(Target(MODEL, 2, 400, BUDGET), second)[0].tokens == take_up(target, second)[0].tokens


@pytest.mark.parametrize(
    ("tokens", "overcommit", "pauses"), [(None, 1.0, False), (260, 1.0, False), (260, 8.0, True)]
)
async def test_answers_are_the_same_however_little_room_there_is(
    tokens: int | None, overcommit: float, pauses: bool
) -> None:
    """Eight answers of up to three pages each, where all have room, or wait, or are paused."""
    asked = [state(prompt(20 + 13 * i, seed=i), max_tokens=90) for i in range(8)]
    alone = [(await answers(Target(MODEL, 1, 260, BUDGET), [one]))[0] for one in asked]
    target = Target(MODEL, 8, 260, BUDGET, tokens, overcommit)
    assert await answers(target, asked) == alone
    assert (target.num_pauses > 0) == pauses
    assert target.cache.num_available == target.cache.num_pages, "all pages came back"


async def test_who_waits_for_room_costs_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(MODEL, 2, 128, BUDGET, cache_tokens=128)
    with served(target) as verifier:
        async with verifier.session() as one, verifier.session() as other:
            await one.prefill(state(prompt(50), max_tokens=60), 8)
            steps = 0
            original = target.step

            def counted(jobs: Sequence[PrefillJob | VerifyJob]) -> object:
                nonlocal steps
                steps += 1
                return original(jobs)

            monkeypatch.setattr(verifier._batcher, "_step", counted)
            waiting = asyncio.create_task(other.prefill(state(prompt(30, seed=1), max_tokens=60), 8))
            await until(lambda: steps > 0)
            await asyncio.sleep(0.2)  # for the further steps that there must not be
            assert (steps, waiting.done()) == (1, False)
        verdict = await waiting
    assert verdict.tokens


def test_jobs_without_room_say_so() -> None:
    target = Target(MODEL, 2, 128, BUDGET, cache_tokens=128)
    first = PrefillJob(target.open(), state(prompt(40), max_tokens=60))
    second = PrefillJob(target.open(), state(prompt(40, seed=1), max_tokens=60))
    assert isinstance(target.step([first])[0], Verdict)
    assert target.step([second]) == [BLOCKED]
    target.close(first.session)
    assert isinstance(target.step([second])[0], Verdict)


def test_a_session_is_not_taken_up_before_where_it_is() -> None:
    """Such a job would wait forever, and every step for it."""
    target = Target(MODEL, 1, 128, BUDGET)
    session = target.open()
    assert isinstance(target.step([PrefillJob(session, state(prompt(40), max_tokens=60))])[0], Verdict)
    (refused,) = target.step([PrefillJob(session, state(prompt(30), max_tokens=60))])
    assert isinstance(refused, ValueError)
    assert "a new session" in str(refused)


def test_a_cache_that_holds_no_session_or_no_memory_holds_is_refused_with_what_to_lower() -> None:
    with pytest.raises(
        ValueError, match="a cache of 100 tokens does not hold a session of max_len 128: raise cache_tok"
    ):
        Target(MODEL, 1, 128, cache_tokens=100)
    too_many = 64 * (free_memory(torch.device("cpu")) // MODEL.bytes_per_position // 64 + 1)
    with pytest.raises(
        ValueError, match=f"a cache of {too_many} tokens takes .* GiB, and .* are left: lower cache_tok"
    ):
        Target(MODEL, 1, 128, cache_tokens=too_many)


def test_beside_trees_a_prompt_takes_what_keeps_the_step_short_as_far_as_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = Target(MODEL, 2, 400, BUDGET)
    session = target.open()
    (verdict,) = target.step([PrefillJob(session, state(prompt(9)))])
    prompt_job = PrefillJob(target.open(), state(prompt(370, seed=1)))
    for rows, taken in ((40, 39), (10**6, 48), (3, 32)):
        monkeypatch.setattr(target.costs, "size_within", lambda seconds, rows=rows: rows)
        before = prompt_job.session.sequence.length
        assert isinstance(verdict, Verdict)
        verdict, _ = target.step([VerifyJob(session, ProposalTree.root_only(verdict.tokens[-1])), prompt_job])
        assert prompt_job.session.sequence.length - before == taken
    before = prompt_job.session.sequence.length
    target.step([prompt_job])
    assert prompt_job.session.sequence.length - before == 48, "alone it takes what there is"


def test_a_tree_that_does_not_grow_from_the_newest_token_is_refused() -> None:
    target = Target(MODEL, 1, 128, BUDGET)
    session = target.open()
    (verdict,) = target.step([PrefillJob(session, state(prompt(9)))])
    assert isinstance(verdict, Verdict)
    (refused,) = target.step([VerifyJob(session, ProposalTree.root_only((verdict.tokens[-1] + 1) % VOCAB))])
    assert isinstance(refused, InvalidTree)
