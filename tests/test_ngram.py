"""Prompt lookup: what followed the newest tokens the last time."""

from __future__ import annotations

import random

import pytest
import torch

from taps.context import ContextDelta
from taps.drafting.drafter import Ask, DraftJob, InvalidAsk
from taps.drafting.ngram import NgramDrafter, NgramSession
from taps.lookup import NgramIndex
from taps.peers import PeerGone
from taps.tree import ProposalTree


def draft(
    drafter: NgramDrafter, session: NgramIndex, tokens: list[int], start: int = 0, **ask: int
) -> ProposalTree:
    delta = ContextDelta(start, tuple(tokens), 0, torch.empty(0, 0))
    (tree,) = drafter.step([DraftJob(session, delta, Ask(**ask))])  # type: ignore[arg-type]  # ask holds ints only
    assert isinstance(tree, ProposalTree)
    return tree


def looked_up(*tokens: int, **ask: int) -> tuple[int, ...]:
    """What is proposed after `tokens`, in a session of its own."""
    drafter = NgramDrafter()
    return draft(drafter, drafter.open(), list(tokens), **ask).tokens[1:]


def test_what_followed_the_suffix_before_is_proposed() -> None:
    assert looked_up(1, 2, 3, 4, 9, 1, 2, depth=2) == (3, 4, 9)


def test_a_proposal_may_run_up_to_the_newest_token() -> None:
    assert looked_up(1, 2, 1, 2, depth=4) == (1, 2)


def test_the_longest_suffix_wins_over_a_later_shorter_one() -> None:
    assert looked_up(9, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2, depth=0) == (7,)


def test_of_equally_long_suffixes_the_latest_wins() -> None:
    assert looked_up(1, 2, 7, 5, 1, 2, 8, 6, 1, 2, depth=0) == (8,)


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2, 3, 4], [1, 2, 3, 4, 1]])
def test_without_a_repeated_pair_nothing_is_proposed(tokens: list[int]) -> None:
    drafter = NgramDrafter()
    assert draft(drafter, drafter.open(), tokens) == ProposalTree.root_only(tokens[-1])


@pytest.mark.parametrize(("num_nodes", "depth", "proposed"), [(1, 4, 0), (3, 4, 2), (16, 0, 1), (16, 4, 5)])
def test_an_ask_bounds_the_proposal(num_nodes: int, depth: int, proposed: int) -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    assert len(looked_up(*tokens, num_nodes=num_nodes, depth=depth)) == proposed


def test_a_longer_match_is_a_surer_one() -> None:
    drafter = NgramDrafter()
    short = draft(drafter, drafter.open(), [8, 1, 2, 7, 9, 1, 2])
    long = draft(drafter, drafter.open(), [9, 1, 2, 7, 9, 1, 2])
    assert long.scores[1] > short.scores[1]


def test_a_session_remembers_and_sessions_are_apart() -> None:
    drafter = NgramDrafter()
    session, other = drafter.open(), drafter.open()
    draft(drafter, session, [1, 2, 3, 4])
    assert draft(drafter, session, [1, 2], start=4, depth=0).tokens == (2, 3)
    assert draft(drafter, other, [1, 2]).tokens == (2,)


def test_a_session_that_is_told_the_past_again_does_not_count_it_twice() -> None:
    drafter = NgramDrafter()
    session = drafter.open()
    draft(drafter, session, [1, 2, 3])
    assert draft(drafter, session, [1, 2, 3]) == ProposalTree.root_only(3)


@pytest.mark.parametrize(("start", "tokens"), [(7, (1, 2)), (-1, (1,)), (0, ())])
def test_a_job_whose_news_do_not_join_fails_alone(start: int, tokens: tuple[int, ...]) -> None:
    drafter, nothing = NgramDrafter(), torch.empty(0, 0)
    jobs = [
        DraftJob(drafter.open(), ContextDelta(start, tokens, 0, nothing), Ask()),
        DraftJob(drafter.open(), ContextDelta(0, (1, 2, 5, 1, 2), 0, nothing), Ask(depth=0)),
    ]
    broken, tree = drafter.step(jobs)
    assert isinstance(broken, InvalidAsk)
    assert isinstance(tree, ProposalTree)
    assert tree.tokens == (2, 5)


def test_jobs_of_one_step_keep_their_order() -> None:
    drafter = NgramDrafter()
    jobs = [
        DraftJob(drafter.open(), ContextDelta(0, (1, 2, token, 1, 2), 0, torch.empty(0, 0)), Ask(depth=0))
        for token in (5, 6, 7)
    ]
    assert [tree.tokens for tree in drafter.step(jobs) if isinstance(tree, ProposalTree)] == [
        (2, 5),
        (2, 6),
        (2, 7),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_proposal_is_a_chain_under_the_newest_token_that_occurred_before(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
    drafter = NgramDrafter()
    tree = draft(drafter, drafter.open(), tokens).check()
    assert tree.is_chain
    assert tree.tokens[0] == tokens[-1]
    n = len(tree)
    assert n == 1 or list(tree.tokens) in [tokens[i : i + n] for i in range(len(tokens) - n + 1)]


@pytest.mark.parametrize("seed", range(10))
def test_the_index_finds_what_a_scan_does(seed: int) -> None:
    rng = random.Random(seed)
    index, tokens = NgramIndex(), list[int]()
    for _ in range(60):
        news = [rng.randrange(4) for _ in range(rng.randrange(1, 4))]
        index.extend(news)
        tokens += news
        assert index.lookup() == scan(tokens)


def scan(tokens: list[int]) -> tuple[int, int]:
    """Where the latest earlier occurrence of the longest suffix of 4 to 2 ends, and its length."""
    for n in range(min(4, len(tokens) - 1), 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return start + n, n
    return 0, 0


async def test_at_hand_it_answers_again_where_there_is_no_news() -> None:
    session, nothing = NgramSession("ngram", 2), torch.empty(0, 0)
    asked = await session.propose(ContextDelta(0, (1, 2, 5, 1, 2), 4, nothing), Ask())
    assert asked.tokens == (2, 5, 1, 2)
    assert await session.propose(ContextDelta(5, (), 4, nothing), Ask()) == asked
    with pytest.raises(PeerGone):
        await session.propose(ContextDelta(7, (1,), 7, nothing), Ask())
