"""The experiment: every setting serves the same questions, side by side, in changing order, round after round.

Knows settings, workloads and the order of things; nothing of what is made of the answers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from cluster.bench.load import Ask, Loop, closed_loop
from cluster.bench.settings import Contender
from cluster.bench.workloads import Workloads, batch
from taps.evaluation.questions import Question

_REQUESTS_PER_STREAM = 2  # at least, in every round
_WARM_UP_TOKENS = 32
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    streams: tuple[int, ...]
    temperatures: tuple[float, ...]
    rounds: int
    questions: int  # a round, at least
    max_tokens: int
    seed: int

    def num_requests(self, streams: int) -> int:
        """Requests of one round."""
        return max(self.questions, streams * _REQUESTS_PER_STREAM if streams > 1 else 1)

    @property
    def questions_wanted(self) -> int:
        """How many a workload is asked for, so that no round repeats another's."""
        return self.rounds * max(map(self.num_requests, self.streams))


class Cell(NamedTuple):
    """What is measured under the same circumstances."""

    workload: str
    temperature: float
    streams: int


class Served(NamedTuple):
    """One round of one cell under one setting: a loop for each question where one stream asks, else one."""

    setting: str
    cell: Cell
    round: int
    loops: tuple[Loop, ...]


def salt() -> str:
    """Keeps what is cached for a request apart from all others."""
    return secrets.token_hex(8)


def cells(plan: Plan, workloads: Workloads) -> Iterator[Cell]:
    for temperature in plan.temperatures:
        for streams in plan.streams:
            for workload in workloads:
                yield Cell(workload, temperature, streams)


async def run(
    contenders: Sequence[Contender], workloads: Workloads, plan: Plan, say: Callable[[Cell, int], None]
) -> list[Served]:
    """Everything that is planned; or, when cancelled, what was done until then.

    Args: say: is told of each cell and round when it is done.
    """
    done: list[Served] = []
    try:
        await _warm_up(contenders, workloads)
        turn = 0
        for number in range(plan.rounds):
            for cell in cells(plan, workloads):
                done += await _round(contenders, cell, number, workloads[cell.workload], plan, turn)
                turn += plan.num_requests(1) if cell.streams == 1 else 1
                say(cell, number)
    except asyncio.CancelledError:
        if not done:
            raise
    return done


async def _warm_up(contenders: Sequence[Contender], workloads: Workloads) -> None:
    """A question of each workload in each setting, the last one: it is asked least."""
    for contender in contenders:
        for question in (questions[-1] for questions in workloads.values()):
            await contender.client.ask(Ask(question.id, question.first_turn, _WARM_UP_TOKENS, 0.0, 0, salt()))


async def _round(
    contenders: Sequence[Contender],
    cell: Cell,
    number: int,
    questions: Sequence[Question],
    plan: Plan,
    turn: int,
) -> list[Served]:
    """Args: turn: how often settings took turns before."""
    chosen = list(enumerate(batch(questions, number, plan.num_requests(cell.streams))))
    loops: dict[str, list[Loop]] = {contender.setting.name: [] for contender in contenders}
    for part in [[one] for one in chosen] if cell.streams == 1 else [chosen]:
        for contender in in_turn(contenders, turn):
            seeds = plan.seed + number * len(chosen)
            asks = [
                Ask(q.id, q.first_turn, plan.max_tokens, cell.temperature, seeds + i, salt()) for i, q in part
            ]
            loops[contender.setting.name].append(await closed_loop(contender.client, asks, cell.streams))
        turn += 1
    return [Served(name, cell, number, tuple(found)) for name, found in loops.items()]


def in_turn(items: Sequence[T], turn: int) -> list[T]:
    """Each comes first in turn, and forwards or backwards, so that nobody always follows the same one."""
    start = (turn // 2) % len(items)
    rotated = [*items[start:], *items[:start]]
    return rotated[::-1] if turn % 2 else rotated
