"""The central invariant on the real target: drafters decide speed, the target alone decides text."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from itertools import cycle, product
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch

from taps.adaptive.planning import Choice, Planner
from taps.adaptive.policy import Adaptive, Fleet
from taps.composing import STRATEGIES, Compose, concatenated, off
from taps.context import Context
from taps.decoding import loop
from taps.decoding.in_process import decode_in_process
from taps.decoding.policy import Fixed, Policy
from taps.decoding.sessions import ServedDrafter
from taps.drafting.batched import BatchedDrafter
from taps.drafting.drafter import Ask
from taps.drafting.ngram import NgramSession
from taps.engine.verifier import BatchedVerifier, BatchedVerifierSession
from taps.lookup import Lookup
from taps.peers import PeerGone
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from taps.verdict import Verdict
from tests.divergence import Divergence, first_divergence
from tests.prompts import PROMPTS

NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0)
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=0.7, seed=11),
    SamplingParams(temperature=1.0, seed=12),
    SamplingParams(temperature=1.0, top_p=0.9, seed=13),
    SamplingParams(temperature=1.0, top_k=40, presence_penalty=0.5, frequency_penalty=0.5, seed=14),
)
COMPOSITIONS = list(product(("single", "confidence", "entropy", "merged"), (1, 2, 3)))
# Float32 logits move by about 5e-5 with the shapes of a batch, so a closer tie may fall either way.
NEAR_TIE = 1e-4  # nats
TOKENS_PER_NEAR_TIE = 50_000

Text = tuple[int, ...]


EVERY = ["single", "confidence", "entropy", "merged", "adaptive", "restless"]


class Question(NamedTuple):
    """One answer to decode."""

    prompt: tuple[int, ...]
    params: SamplingParams
    limits: Mapping[str, Any] = {}  # more of its `SessionState`


def questions(tokenizer: Any, prompts: Sequence[str], samplings: Sequence[SamplingParams]) -> list[Question]:
    """Every prompt under every sampling."""
    encoded = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in prompts
    ]
    return [Question(tuple(e["input_ids"]), params) for params in samplings for e in encoded]


def rotated(drafters: Sequence[BatchedDrafter], count: int) -> list[BatchedDrafter]:
    """`count` drafters, each count beginning with another one."""
    return [drafters[(count - 1 + i) % len(drafters)] for i in range(count)]


class AtHand:
    """The n-gram drafter where the loop runs: a verifier that decodes plainly looks up by itself, too."""

    name = "at hand"

    @asynccontextmanager
    async def session(self, index: int) -> AsyncIterator[NgramSession]:
        yield NgramSession(self.name, index)


class Lost:
    """A session of a verifier that is killed after so many passes."""

    def __init__(self, session: BatchedVerifierSession, passes: int) -> None:
        self.numerics, self.prefill = session.numerics, session.prefill
        self._session = session
        self._passes = passes

    async def verify(self, tree: ProposalTree) -> Verdict:
        self._live()
        return await self._session.verify(tree)

    async def ahead(self, window: int, lookup: Lookup | None = None) -> Sequence[Verdict]:
        self._live()
        return await self._session.ahead(window, lookup)

    def _live(self) -> None:
        self._passes -= 1
        if self._passes < 0:
            raise PeerGone("the verifier was lost")


class Losing:
    """A verifier all of whose sessions are lost: answers go on in new ones."""

    def __init__(self, verifier: BatchedVerifier, passes: int) -> None:
        self._verifier = verifier
        self._passes = passes

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Lost]:
        async with self._verifier.session() as session:
            yield Lost(session, self._passes)


Strategy: TypeAlias = Compose | Fleet
Ahead: TypeAlias = Callable[[BatchedVerifierSession, int, Lookup | None], Awaitable[list[Verdict]]]


class Restless(Planner):
    """Switches between drafting and plain decoding, and from drafter to drafter, for no reason."""

    def __init__(self) -> None:
        super().__init__()
        self._rng = random.Random(6)

    def choose(
        self, session: Hashable, gains: Mapping[str, Callable[[int], float]], free_gain: float,
        version: int = 0,
    ) -> Choice:  # fmt: skip
        if not gains or self._rng.random() < 0.5:
            return Choice((), 0, 0.0, is_plain=True)
        count = self._rng.randrange(1, len(gains) + 1)
        return Choice(tuple(self._rng.sample(sorted(gains), count)), self._rng.randrange(1, 5), 1.0)


def counting(ahead: Ahead, counts: Counter[str]) -> Ahead:
    """`BatchedVerifierSession.ahead`, and how many nodes it looked up."""

    async def counted(self: BatchedVerifierSession, window: int, lookup: Lookup | None = None) -> list[Verdict]:
        verdicts = await ahead(self, window, lookup)
        counts["nodes"] += sum(verdict.num_nodes for verdict in verdicts)
        counts["accepted"] += sum(len(verdict.owners) for verdict in verdicts)
        return verdicts

    return counted


@contextmanager
def following(strategy: Strategy, ask: Ask, names: Sequence[str]) -> Iterator[Policy]:
    if not isinstance(strategy, Fleet):
        yield Fixed(strategy, ask)
        return
    with closing(Adaptive(strategy, names, ask)) as policy:
        yield policy


async def answer(
    question: Question,
    verifier: BatchedVerifier | Losing,
    drafters: Sequence[ServedDrafter],
    strategy: Strategy,
    new_tokens: int,
    cache_salt: str = "",
) -> Text:
    state = SessionState(question.prompt, sampling=question.params, cache_salt=cache_salt, **question.limits)
    context = Context(state, 512)
    ask = Ask(num_nodes=6, depth=3, top_k=3, sampling=question.params)
    with following(strategy, ask, [drafter.name for drafter in drafters]) as policy:
        async with aclosing(decode_in_process(context, verifier, drafters, policy)) as steps:
            async for _ in steps:
                if context.num_generated >= new_tokens or context.tokens[-1] in state.end_tokens:
                    break
    return tuple(context.tokens[context.prompt_length :][:new_tokens])


def answer_all(
    asked: Sequence[Question],
    verifier: BatchedVerifier | Losing,
    drafters: Sequence[ServedDrafter],
    strategy: Strategy | list[Strategy],
    new_tokens: int = NEW_TOKENS,
    at_once: int = 20,
) -> list[Text]:
    """Answers of `new_tokens` tokens each; `at_once` sessions of every kind of sampling share their passes.

    Args: strategy: of every answer; several are taken in turn.
    """
    turns = cycle(strategy if isinstance(strategy, list) else [strategy])

    async def run(batch: Sequence[Question]) -> list[Text]:
        return await asyncio.gather(*(answer(q, verifier, drafters, next(turns), new_tokens) for q in batch))

    return [
        text
        for start in range(0, len(asked), at_once)
        for text in asyncio.run(run(asked[start : start + at_once]))
    ]


def answered_by(
    strategy: str, asked: Sequence[Question], verifier: BatchedVerifier, drafters: Sequence[BatchedDrafter],
    new_tokens: int,
) -> list[Text]:  # fmt: skip
    """Answers with one of `EVERY`: of two heads, and of the n-gram drafter at hand where it may look up."""
    fleets: dict[str, Strategy] = {"adaptive": Fleet(), "restless": Fleet(Restless())}
    panel: list[ServedDrafter] = [*drafters[:2], AtHand() if strategy in fleets else drafters[2]]
    return answer_all(asked, verifier, panel, fleets.get(strategy) or STRATEGIES[strategy], new_tokens)


def mixed() -> list[Strategy]:
    """What answers of one batch may follow."""
    return [off, *STRATEGIES.values(), Fleet(Restless())]


def plain_alone(
    asked: Sequence[Question], verifier: BatchedVerifier, new_tokens: int = NEW_TOKENS
) -> list[Text]:
    """Plain decoding, one session a step, where nothing is found again: what all else is compared with."""
    return [
        asyncio.run(answer(question, verifier, [], off, new_tokens, f"alone {i}"))
        for i, question in enumerate(asked)
    ]


def generate(reference: Any, prompt: Sequence[int], new_tokens: int) -> Text:
    """The target's greedy text by transformers alone. It goes on after an end token, as ours does here."""
    ids = torch.tensor([prompt])
    generated = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
        min_new_tokens=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return tuple(generated[0, ids.shape[1] :].tolist())


def divergences(
    reference: Any, asked: Sequence[Question], ours: Sequence[Text], theirs: Sequence[Text]
) -> list[Divergence]:
    found = [
        first_divergence(reference, question.prompt, a, b, question.params)
        for question, a, b in zip(asked, ours, theirs, strict=True)
    ]
    return [divergence for divergence in found if divergence is not None]


def check_near_ties(found: Sequence[Divergence], num_tokens: int) -> None:
    """Between other numerics: identical, or parting at a near-tie, at most one in 50,000 tokens."""
    assert all(divergence.margin < NEAR_TIE for divergence in found), found
    assert len(found) <= 1 + num_tokens // TOKENS_PER_NEAR_TIE


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Question]:
    return questions(tokenizer, PROMPTS[:4], SAMPLINGS)


@pytest.fixture(scope="module")
def plain(asked: list[Question], verifier: BatchedVerifier) -> list[Text]:
    """Our plain decoding in float32, one session a step."""
    return plain_alone(asked, verifier)


@pytest.fixture(scope="module")
def plain_bf16(asked: list[Question], verifier_bf16: BatchedVerifier) -> list[Text]:
    return plain_alone(asked, verifier_bf16)


def test_the_probe_passes_on_the_served_target(
    verifier: BatchedVerifier, verifier_bf16: BatchedVerifier
) -> None:
    """Else the tests below would ask for what is not promised."""
    for probed in (verifier, verifier_bf16):
        asyncio.run(probed.warm_up())
        assert probed.target.inexact_because is None


def test_plain_greedy_decoding_equals_transformers_generate(
    reference: Any, asked: list[Question], plain: list[Text]
) -> None:
    """Whose sums have another order."""
    greedy = [(q, text) for q, text in zip(asked, plain, strict=True) if q.params == GREEDY]
    theirs = [generate(reference, question.prompt, NEW_TOKENS) for question, _ in greedy]
    found = divergences(reference, [q for q, _ in greedy], [text for _, text in greedy], theirs)
    check_near_ties(found, len(greedy) * NEW_TOKENS)


def test_sharing_steps_changes_no_bit_of_plain_text(
    asked: list[Question], plain: list[Text], plain_bf16: list[Text], verifier: BatchedVerifier,
    verifier_bf16: BatchedVerifier,
) -> None:  # fmt: skip
    assert answer_all(asked, verifier, [], off) == plain
    assert answer_all(asked, verifier_bf16, [], off) == plain_bf16


@pytest.mark.parametrize(("strategy", "num_drafters"), COMPOSITIONS)
def test_greedy_and_sampled_text_is_the_targets_own(
    strategy: str,
    num_drafters: int,
    asked: list[Question],
    plain: list[Text],
    verifier: BatchedVerifier,
    drafters: list[BatchedDrafter],
) -> None:
    assert answer_all(asked, verifier, rotated(drafters, num_drafters), STRATEGIES[strategy]) == plain


@pytest.mark.parametrize(
    ("strategy", "num_drafters"), [("single", 1), ("confidence", 2), ("entropy", 3), ("merged", 3)]
)
def test_in_bfloat16_too(
    strategy: str,
    num_drafters: int,
    asked: list[Question],
    plain_bf16: list[Text],
    verifier_bf16: BatchedVerifier,
    drafters: list[BatchedDrafter],
) -> None:
    ours = answer_all(asked, verifier_bf16, rotated(drafters, num_drafters), STRATEGIES[strategy])
    assert ours == plain_bf16


@pytest.mark.parametrize("planner", [Planner, Restless])
def test_switching_drafters_on_and_off_changes_no_text(
    planner: type[Planner], asked: list[Question], plain: list[Text], plain_bf16: list[Text],
    verifier: BatchedVerifier, verifier_bf16: BatchedVerifier, drafters: list[BatchedDrafter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And not what the verifier looks up by itself, where it may: beside drafters, and alone."""
    looked_up = Counter[str]()
    monkeypatch.setattr(BatchedVerifierSession, "ahead", counting(BatchedVerifierSession.ahead, looked_up))
    at_hand: list[ServedDrafter] = [*drafters[:2], AtHand()]
    fleet = Fleet(planner())
    for panel in (drafters, at_hand):
        assert answer_all(asked, verifier, panel, fleet) == plain
        assert answer_all(asked, verifier_bf16, panel, fleet) == plain_bf16
    assert answer_all(asked, verifier_bf16, [AtHand()], fleet) == plain_bf16
    assert looked_up["nodes"] > looked_up["accepted"] > 0


def test_strategies_may_be_mixed_and_the_verifier_killed_in_mid_answer(
    asked: list[Question], plain_bf16: list[Text], verifier_bf16: BatchedVerifier,
    drafters: list[BatchedDrafter], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The second time with pages of the first that are found again."""
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.0)
    mixture: list[Strategy] = [*STRATEGIES.values(), Fleet(), Fleet(Restless())]
    for _ in range(2):
        assert answer_all(asked, verifier_bf16, drafters, mixture) == plain_bf16
    assert answer_all(asked, Losing(verifier_bf16, 3), drafters, mixture) == plain_bf16


def test_duplicate_proposals_and_the_concatenated_merge_change_no_text(
    asked: list[Question], plain: list[Text], verifier: BatchedVerifier, drafters: list[BatchedDrafter]
) -> None:
    twice = [drafters[0], drafters[0], drafters[1]]
    assert answer_all(asked, verifier, twice, concatenated) == plain
