"""The order of a benchmark's experiment, what is asked in it, and that an interrupted one keeps what it did."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.bench.experiment import Cell, Plan, Served, in_turn, run
from cluster.bench.load import Client
from cluster.bench.settings import Contender, Setting
from cluster.bench.workloads import MIXTURE, SHIPPED, batch, load_workloads, mixed
from taps.evaluation.questions import Question
from tests.endpoint import Behaviour, Endpoint, endpoint
from tests.fakes import until
from tests.test_sources import written

PLAN = Plan(streams=(1, 3), temperatures=(0.0, 1.0), rounds=2, questions=2, max_tokens=4, seed=5)
QUESTIONS = [Question(str(i), (f"question {i}",)) for i in range(20)]


async def ran(
    server: Endpoint, plan: Plan = PLAN, say: Callable[[Cell, int], None] = lambda *_: None, names: str = "abc"
) -> list[Served]:
    settings = [Setting(name, server.url, "fixed", {"setting": name}) for name in names]
    contenders = [Contender(setting, Client(server.url, "small", setting.body)) for setting in settings]
    try:
        return await run(contenders, {"numbers": QUESTIONS}, plan, say)
    finally:
        for contender in contenders:
            await contender.client.close()


async def test_every_setting_is_asked_the_same_with_the_same_seeds_and_salts_of_its_own() -> None:
    with endpoint(lambda _: Behaviour()) as server:
        done = await ran(server)
    asked: dict[str, list[str]] = {}
    for body in server.asked[3:]:  # what comes before warms up
        shared = [body[name] for name in ("messages", "seed", "temperature", "max_tokens")]
        asked.setdefault(body["setting"], []).append(str(shared))
    assert Counter(asked["a"]) == Counter(asked["b"]) == Counter(asked["c"])
    assert len({body["cache_salt"] for body in server.asked}) == len(server.asked)
    assert len(asked["a"]) == 2 * 2 * (2 + 6)
    assert Counter((s.setting, s.cell, s.round) for s in done).most_common(1)[0][1] == 1
    assert len(done) == 3 * 2 * 2 * 2


async def test_with_one_stream_settings_take_turns_question_by_question() -> None:
    with endpoint(lambda _: Behaviour()) as server:
        await ran(server, Plan((1,), (0.0,), 2, 3, 4, 0))
    bodies = server.asked[3:]
    for start in range(0, len(bodies), 3):
        neighbours = bodies[start : start + 3]
        assert {body["setting"] for body in neighbours} == {"a", "b", "c"}
        assert len({body["messages"][0]["content"] for body in neighbours}) == 1


async def test_rounds_ask_other_questions_for_as_long_as_there_are_others() -> None:
    with endpoint(lambda _: Behaviour()) as server:
        await ran(server, Plan((1,), (0.0,), 3, 4, 4, 0), names="a")
    contents = [body["messages"][0]["content"] for body in server.asked[1:]]
    assert contents == [f"question {i}" for i in range(12)]
    assert [q.id for q in batch(QUESTIONS[:3], 1, 4)] == ["1", "2", "0", "1"]


def test_every_setting_is_first_and_last_equally_often_and_follows_each_of_the_others() -> None:
    orders = [in_turn("abc", turn) for turn in range(12)]
    assert set(Counter(order[0] for order in orders).values()) == {4}
    assert set(Counter(order[-1] for order in orders).values()) == {4}
    followed = {(order[i], order[i + 1]) for order in orders for i in range(2)}
    assert len(followed) == 6
    assert in_turn("a", 5) == ["a"]


async def test_an_interrupted_experiment_keeps_the_cells_it_finished() -> None:
    with endpoint(lambda _: Behaviour()) as server:
        done_cells: list[Cell] = []

        def say(cell: Cell, number: int) -> None:
            done_cells.append(cell)
            if len(done_cells) == 3:
                task.cancel()

        task = asyncio.create_task(ran(server, say=say))
        done = await task
    assert len(done) == 3 * len(done_cells) == 9


async def test_one_interrupted_before_anything_was_done_is_just_cancelled() -> None:
    with endpoint(lambda _: Behaviour(wait_s=60)) as server:
        task = asyncio.create_task(ran(server))
        await until(lambda: bool(server.asked))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_more_streams_get_more_questions() -> None:
    plan = Plan((1, 2, 16), (0.0,), 5, 16, 128, 0)
    assert [plan.num_requests(streams) for streams in plan.streams] == [16, 16, 32]
    assert plan.questions_wanted == 160


def test_sixteen_questions_of_each_shipped_workload_and_all_of_them_in_the_mixture() -> None:
    workloads = load_workloads((), {}, 100)
    assert list(workloads) == [*SHIPPED, MIXTURE]
    assert [len(workloads[name]) for name in SHIPPED] == [16] * 4
    assert len({q.turns for q in workloads[MIXTURE]}) == 64
    assert sum(len(question.turns) > 1 for question in workloads["chat"]) >= 4


def test_a_mixture_asks_one_of_each_in_turn_until_none_is_left() -> None:
    questions = mixed({"a": QUESTIONS[:3], "b": QUESTIONS[3:4]})
    assert [question.id for question in questions] == ["a/0", "b/3", "a/1", "a/2"]


def test_data_of_ones_own_replaces_shipped_workloads_or_adds_to_them(tmp_path: Path) -> None:
    path = str(written(tmp_path / "q.jsonl", {"question": "One?", "system": "Be brief."}))
    assert list(load_workloads((), {"mine": path}, 5)) == [*SHIPPED, "mine", MIXTURE]
    replaced = load_workloads(("math", "chat", MIXTURE), {"math": path}, 5)
    assert [len(questions) for questions in replaced.values()] == [1, 5, 6]
    assert replaced["math"][0].first_turn[0] == {"role": "system", "content": "Be brief."}
    assert len(load_workloads((MIXTURE,), {}, 3)[MIXTURE]) == 12


def test_an_unknown_workload_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"no workload 'poems'; choose among math, .*, mine, mixture, or add it"
    ):
        load_workloads(("poems",), {"mine": "x"}, 5)
    with pytest.raises(ValueError, match=r"--data names 'mine', which --workloads does not"):
        load_workloads(("math",), {"mine": "x"}, 5)
