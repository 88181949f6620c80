"""What prefixes that are found again save: time to first token, cold and warm, apart from everything else.

A question is asked twice, one right after the other in changing order: with a `cache_salt` that nothing was
cached under, and with one under which what it begins with was just computed. Knows two ways to share that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from cluster.bench.comparison import estimate
from cluster.bench.experiment import Plan, salt
from cluster.bench.load import Ask, Client
from cluster.bench.settings import Contender
from cluster.bench.streams import Answer
from taps.evaluation.questions import Question

_TOKENS = 2  # of an answer whose first token alone is timed
_PREFIX_CHARACTERS = 3000  # of a shared document
Messages = list[dict[str, str]]
Kind = Literal["second_turn", "repeated_prefix"]


class Timed(NamedTuple):
    """One question, cold and warm."""

    cold: Answer
    warm: Answer


async def measure_reuse(
    contenders: Sequence[Contender],
    workloads: Mapping[str, Sequence[Question]],
    plan: Plan,
    say: Callable[[str, str], None],
) -> list[dict[str, Any]]:
    """A row for each setting and way to share a beginning. Args: say: is told of each."""
    questions = list({q.turns: q for of in workloads.values() for q in of}.values())
    found: list[dict[str, Any]] = []
    for setting, client in contenders:
        kinds: dict[Kind, list[Timed]] = {
            "second_turn": await _second_turns(client, questions, plan),
            "repeated_prefix": await _repeated_prefix(client, questions, plan),
        }
        for kind, timed in kinds.items():
            if good := [both for both in timed if _is_whole(both)]:
                failed = len(timed) - len(good)
                found.append({"setting": setting.name, "kind": kind, "failed": failed, **row(good)})
            if timed:
                say(setting.name, f"{kind.replace('_', ' ')}: {len(good)} of {len(timed)} questions answered")
    return found


async def _second_turns(client: Client, questions: Sequence[Question], plan: Plan) -> list[Timed]:
    """The second question of a conversation, after the server's own answer to the first."""
    timed = []
    for number, question in enumerate([q for q in questions if len(q.turns) > 1][: plan.questions]):
        kept = salt()
        first = await client.ask(Ask(question.id, question.first_turn, plan.max_tokens, 0.0, plan.seed, kept))
        said = {"role": "assistant", "content": first.text}
        messages = [*question.first_turn, said, {"role": "user", "content": question.turns[1]}]
        timed.append(await _both(client, question.id, messages, kept, number))
    return timed


async def _repeated_prefix(client: Client, questions: Sequence[Question], plan: Plan) -> list[Timed]:
    """Questions after one long document, which another question was asked about before."""
    document = "\n".join(turn for question in questions for turn in question.turns)[:_PREFIX_CHARACTERS]
    system = {"role": "system", "content": f"These are questions that were asked before:\n{document}"}
    kept = salt()
    first, *others = questions[: plan.questions + 1]
    await client.ask(Ask(first.id, _about(system, first), _TOKENS, 0.0, plan.seed, kept))
    return [
        await _both(client, question.id, _about(system, question), kept, number)
        for number, question in enumerate(others)
    ]


def _about(system: dict[str, str], question: Question) -> Messages:
    return [system, {"role": "user", "content": question.turns[0]}]


async def _both(client: Client, name: str, messages: Messages, kept: str, number: int) -> Timed:
    """Args: kept: the salt under which the beginning was computed."""
    salts = {"cold": salt(), "warm": kept}
    answers = {}
    for which in sorted(salts, reverse=number % 2 == 1):
        answers[which] = await client.ask(Ask(name, messages, _TOKENS, 0.0, 0, salts[which]))
    return Timed(answers["cold"], answers["warm"])


def _is_whole(timed: Timed) -> bool:
    return all(answer.error is None and answer.arrivals for answer in timed)


def row(timed: Sequence[Timed]) -> dict[str, Any]:
    """Medians over the questions."""
    cold = [both.cold.first_token_s or 0.0 for both in timed]
    warm = [both.warm.first_token_s or 0.0 for both in timed]
    ratio = estimate([late / early for late, early in zip(cold, warm, strict=True)])
    return {
        "questions": len(timed),
        "prompt_tokens": estimate([both.warm.prompt_tokens for both in timed]).value,
        "cached_tokens_cold": estimate([both.cold.cached_tokens for both in timed]).value,
        "cached_tokens_warm": estimate([both.warm.cached_tokens for both in timed]).value,
        "ttft_ms_cold": round(estimate(cold).value * 1e3, 2),
        "ttft_ms_warm": round(estimate(warm).value * 1e3, 2),
        "cold_over_warm": {
            "value": round(ratio.value, 3), "interval_95": [round(ratio.low, 3), round(ratio.high, 3)]
        },
    }  # fmt: skip
