"""The context: tokens decided, and features that line up with them whatever the window."""

from __future__ import annotations

import random
import weakref

import pytest

from taps.context import Context
from taps.session import SessionState
from tests.fakes import make_verdict, positions_of


def prefilled(prompt_length: int, window: int) -> Context:
    context = Context(SessionState(tuple(range(100, 100 + prompt_length))), window)
    context.restart(make_verdict([1], range(max(0, prompt_length - window), prompt_length)))
    return context


def grow(context: Context, *tokens: int) -> None:
    """One verify pass: the root and all tokens but the last one are committed."""
    root = len(context.tokens) - 1
    context.extend(make_verdict(tokens, range(root, root + len(tokens))))


def test_a_new_drafter_hears_everything() -> None:
    news = prefilled(4, window=100).since(0)
    assert news.tokens == (100, 101, 102, 103, 1)
    assert (news.start, news.end, news.root) == (0, 5, 1)
    assert news.feature_start == 0
    assert positions_of(news.features) == [0, 1, 2, 3]


def test_a_drafter_that_knows_the_past_hears_new_tokens_and_the_features_that_complete_their_pairs() -> None:
    context = prefilled(4, window=100)
    grow(context, 2, 3)
    news = context.since(5)
    assert news.tokens == (2, 3)
    assert (news.start, news.end, news.root) == (5, 7, 3)
    assert news.feature_start == 4
    assert positions_of(news.features) == [4, 5]


@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize("seed", range(5))
def test_features_end_before_the_root_and_reach_back_as_far_as_known_or_the_window(
    seed: int, window: int
) -> None:
    rng = random.Random(seed)
    context = prefilled(rng.randrange(1, 12), window)
    for _ in range(8):
        grow(context, *(rng.randrange(9) for _ in range(rng.randrange(1, 6))))
        num_tokens = len(context.tokens)
        for known in range(num_tokens):
            news = context.since(known)
            assert list(news.tokens) == context.tokens[known:]
            assert news.feature_start == max(known - 1, num_tokens - 1 - window, 0)
            assert positions_of(news.features) == list(range(news.feature_start, num_tokens - 1))


def test_a_verifier_that_returns_fewer_features_than_the_window_sets_where_they_start() -> None:
    context = Context(SessionState(tuple(range(10))), feature_window=8)
    context.restart(make_verdict([1], range(7, 10)))
    assert context.since(0).feature_start == 7
    assert positions_of(context.since(0).features) == [7, 8, 9]


def test_a_restart_replaces_the_features_and_keeps_the_tokens() -> None:
    context = prefilled(4, window=100)
    grow(context, 2, 3)
    context.restart(make_verdict([4], range(2, 7)))
    assert context.tokens == [100, 101, 102, 103, 1, 2, 3, 4]
    assert context.since(0).feature_start == 2
    assert positions_of(context.since(0).features) == [2, 3, 4, 5, 6]


def test_a_drafter_that_missed_the_restart_is_told_the_tokens_decided_since() -> None:
    context = prefilled(4, window=100)
    context.restart(make_verdict([4], range(5)))
    news = context.since(5)
    assert news.tokens == (4,)
    assert positions_of(news.features) == [4]


def test_generated_tokens_are_those_after_the_prompt() -> None:
    context = Context(SessionState((7, 8, 9)), feature_window=4)
    assert context.num_generated == 0
    assert context.root == 9
    context.restart(make_verdict([1], range(3)))
    grow(context, 2, 3)
    assert context.num_generated == 3
    assert context.root == 3


def test_features_older_than_the_window_are_freed() -> None:
    context = Context(SessionState((7,)), feature_window=4)
    verdict = make_verdict([1], [0])
    oldest = weakref.ref(verdict.features)
    context.restart(verdict)
    del verdict
    assert oldest() is not None
    for _ in range(4):
        grow(context, 2)
    assert oldest() is None


def test_the_callers_prompt_is_not_changed() -> None:
    prompt = [1, 2]
    context = Context(SessionState(tuple(prompt)), feature_window=4)
    context.restart(make_verdict([3], range(2)))
    assert prompt == [1, 2]


def test_features_that_come_later_take_their_places_and_leave_no_gap() -> None:
    context = Context(SessionState((7, 8)), feature_window=8)
    context.restart(make_verdict([1], [0, 1]))
    assert context.is_complete
    for token in (2, 3):
        context.extend(make_verdict([token]))
    assert not context.is_complete
    context.extend(make_verdict([4], [2, 3, 4]))
    assert context.is_complete
    assert positions_of(context.since(0).features) == [0, 1, 2, 3, 4]
    for token in (5, 6, 7):
        context.extend(make_verdict([token]))
    context.extend(make_verdict([9], [7, 8]))
    delta = context.since(0)
    assert (delta.feature_start, positions_of(delta.features)) == (7, [7, 8]), "those before are not known"
