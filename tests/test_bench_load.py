"""Load on a server over HTTP: closed loops, and what becomes of requests that are refused, cut or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from cluster.bench.load import Ask, Client, Loop, closed_loop
from cluster.bench.streams import Answer, Json
from tests.endpoint import Behaviour, Endpoint, endpoint
from tests.fakes import until


def ask(question: str = "q", salt: str = "s") -> Ask:
    return Ask(question, [{"role": "user", "content": "Hi"}], 8, 0.5, 7, salt)


async def asked(server: Endpoint, body: Json | None = None, timeout_s: float = 20.0) -> Answer:
    client = Client(server.url, "small", body or {}, timeout_s=timeout_s)
    try:
        return await client.ask(ask())
    finally:
        await client.close()


async def looped(server: Endpoint, num_asks: int, num_streams: int) -> Loop:
    client = Client(server.url, "small", {})
    try:
        return await closed_loop(client, [ask(str(i)) for i in range(num_asks)], num_streams)
    finally:
        await client.close()


def turns(*behaviours: Behaviour) -> Callable[[Json], Behaviour]:
    """One after the other, the last for ever."""
    left: Iterator[Behaviour] = iter(behaviours)
    return lambda _: next(left, behaviours[-1])


@pytest.mark.parametrize(("num_asks", "num_streams"), [(9, 1), (9, 4), (2, 4)])
async def test_so_many_streams_ask_at_once_until_everything_is_answered(
    num_asks: int, num_streams: int
) -> None:
    with endpoint(lambda _: Behaviour(wait_s=0.02)) as server:
        loop = await looped(server, num_asks, num_streams)
        assert server.most_at_once == min(num_asks, num_streams)
    assert sorted(answer.question for answer in loop.answers) == [str(i) for i in range(num_asks)]
    assert all(answer.error is None and answer.tokens == 8 for answer in loop.answers)
    assert 0 < loop.client_cpu_s < loop.seconds + 1


async def test_times_are_those_of_the_stream() -> None:
    with endpoint(lambda _: Behaviour(chunks=4, wait_s=0.15, gap_s=0.03)) as server:
        answer = await asked(server)
    assert answer.first_token_s is not None
    assert 0.14 < answer.first_token_s < 1.5
    assert len(answer.gaps_s) == 3
    assert sum(answer.gaps_s) > 0.08
    assert answer.seconds >= answer.first_token_s + sum(answer.gaps_s)


async def test_a_request_says_all_that_it_means_and_a_body_changes_or_removes_fields() -> None:
    with endpoint(lambda _: Behaviour()) as server:
        await asked(server)
        await asked(server, {"taps": {"strategy": "off"}, "cache_salt": None, "max_tokens": 3})
    assert all(b"accept-encoding: identity" in head.lower() for head in server.headers)
    plain, changed = server.asked
    assert plain == {
        "model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0.5,
        "seed": 7, "cache_salt": "s", "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert changed["taps"] == {"strategy": "off"}
    assert changed["max_tokens"] == 3
    assert "cache_salt" not in changed


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refused_request_is_sent_again_and_its_time_goes_on(status: int) -> None:
    refusal = Behaviour(status=status, message="full")
    with endpoint(turns(refusal, refusal, Behaviour())) as server:
        answer = await asked(server)
    assert (answer.error, answer.refusals, answer.tokens) == (None, 2, 8)
    assert answer.first_token_s is not None
    assert answer.first_token_s > 0.4


async def test_a_server_says_when_to_come_again() -> None:
    refusal = Behaviour(status=503, headers="Retry-After: 0\r\n")
    with endpoint(turns(*[refusal] * 5, Behaviour())) as server:
        answer = await asked(server)
    assert (answer.error, answer.refusals) == (None, 5)
    assert answer.seconds < 1


async def test_a_request_that_is_refused_for_too_long_has_failed() -> None:
    with endpoint(lambda _: Behaviour(status=503, message="full", headers="Retry-After: 9999\r\n")) as server:
        answer = await asked(server)
    assert (answer.error, answer.tokens, answer.status) == ("HTTP 503: full", 0, 503)


async def test_another_error_fails_at_once_with_what_the_server_said() -> None:
    with endpoint(lambda _: Behaviour(status=500, message="out of\nluck")) as server:
        answer = await asked(server)
    assert (answer.error, answer.status, answer.refusals) == ("HTTP 500: out of luck", 500, 0)
    assert len(server.asked) == 1


async def test_a_stream_that_is_cut_has_failed_and_keeps_what_came() -> None:
    with endpoint(lambda _: Behaviour(cut=True)) as server:
        answer = await asked(server)
    assert answer.error is not None
    assert len(answer.arrivals) == 4


async def test_an_error_in_the_stream_is_the_answers() -> None:
    with endpoint(lambda _: Behaviour(error="the verifier is gone")) as server:
        assert (await asked(server)).error == "the verifier is gone"


async def test_a_stream_that_falls_silent_has_failed() -> None:
    with endpoint(lambda _: Behaviour(gap_s=30.0)) as server:
        answer = await asked(server, timeout_s=0.2)
    assert answer.error is not None
    assert "ReadTimeout" in answer.error
    assert len(answer.arrivals) == 1


async def test_one_failure_ends_neither_the_loop_nor_the_other_streams() -> None:
    with endpoint(turns(Behaviour(cut=True), Behaviour(status=500), Behaviour())) as server:
        loop = await looped(server, 6, 2)
    assert sum(answer.error is None for answer in loop.answers) == 4


async def test_a_server_that_is_away_is_an_answer_that_failed() -> None:
    with endpoint(lambda _: Behaviour()) as server:
        pass
    answer = await asked(server)
    assert answer.error is not None
    assert "Connect" in answer.error


async def test_a_server_without_usage_is_counted_by_its_chunks() -> None:
    with endpoint(lambda _: Behaviour(chunks=5, usage=False)) as server:
        answer = await asked(server)
    assert (answer.tokens, answer.tokens_are_chunks, answer.error) == (5, True, None)


async def test_a_cancelled_loop_leaves_no_request_behind() -> None:
    with endpoint(lambda _: Behaviour(wait_s=60.0)) as server:
        task = asyncio.create_task(looped(server, 4, 2))
        await until(lambda: len(server.asked) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(server.asked) == 2
