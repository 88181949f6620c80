"""Texts of a given form: with every strategy what plain decoding gives where only what is allowed may come."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from llguidance import LLMatcher, LLTokenizer

from deployments.structured import grammar_of
from taps.composing import off
from taps.decoding import loop
from taps.decoding.delivery import end_tokens
from taps.drafting.batched import BatchedDrafter
from taps.engine.grammars import Grammars, TextState
from taps.engine.target import Target
from taps.engine.verifier import BatchedVerifier
from taps.models.causal_lm import CausalLM
from taps.session import SessionState
from taps.shaping import SamplingParams
from taps.tree import ProposalTree
from taps.verdict import InvalidGrammar
from tests.test_exactness import (
    EVERY,
    GREEDY,
    Losing,
    Question,
    Text,
    answer_all,
    answered_by,
    mixed,
    plain_alone,
    questions,
)
from tests.tiny import tiny_target

NEW_TOKENS = 40
SAMPLED = SamplingParams(temperature=1.0, seed=11)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "profession": {"enum": ["teacher", "carpenter", "astronomer"]},
    },
    "required": ["name", "age", "profession"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"guided_json": PERSON},
    {"response_format": {"type": "json_object"}},
    {"guided_regex": r"[0-9]{3}-[0-9]{4} (yes|no), because [a-z ]{5,30}\."},
    {"guided_choice": ["definitely not", "definitely", "perhaps, but I am not sure"]},
    {"guided_grammar": 'root ::= "(" number ")" | number\nnumber ::= [0-9]+ (" + " [0-9]+)?'},
]


@pytest.fixture(scope="module")
def ends(target_directory: Any, tokenizer: Any) -> tuple[int, ...]:
    return tuple(sorted(end_tokens(str(target_directory), tokenizer)))


@pytest.fixture(scope="module")
def asked(tokenizer: Any, ends: tuple[int, ...]) -> list[Question]:
    """Every form, greedy and drawn, and beside them texts of none."""
    (plain,) = questions(tokenizer, ["Tell me of somebody who builds things, in a few words."], [GREEDY])
    found = [
        plain._replace(params=params, limits={"grammar": grammar_of(form), "end_tokens": ends})
        for form in FORMS
        for params in (GREEDY, SAMPLED)
    ]
    return [*found, plain._replace(params=SAMPLED), plain]


@pytest.fixture(scope="module")
def plain(asked: list[Question], verifier: BatchedVerifier) -> list[Text]:
    return plain_alone(asked, verifier, NEW_TOKENS)


@pytest.fixture(scope="module")
def plain_bf16(asked: list[Question], verifier_bf16: BatchedVerifier) -> list[Text]:
    return plain_alone(asked, verifier_bf16, NEW_TOKENS)


def generate(reference: Any, grammars: Grammars, question: Question) -> Text:
    """The greedy text by `transformers` alone; the grammar library's own acceptor says what may come."""
    matcher = LLMatcher(grammars.tokenizer, question.limits["grammar"])
    ids = torch.tensor([question.prompt])

    def allowed(_: int, tokens: torch.Tensor) -> list[int]:
        matcher.reset()
        assert matcher.consume_tokens(tokens[ids.shape[1] :].tolist())
        return [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]

    generated = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0,
        prefix_allowed_tokens_fn=allowed, eos_token_id=list(question.limits["end_tokens"]),
    )  # fmt: skip
    return tuple(generated[0, ids.shape[1] :].tolist())


def test_greedy_text_is_what_transformers_generates_under_the_librarys_own_acceptor(
    reference: Any, grammars: Grammars, asked: list[Question], plain: list[Text]
) -> None:
    for question, text in zip(asked, plain, strict=True):
        if question.params.greedy and "grammar" in question.limits:
            assert generate(reference, grammars, question) == text


def test_texts_have_the_form_they_were_asked_for(
    tokenizer: Any, grammars: Grammars, asked: list[Question], plain: list[Text], ends: tuple[int, ...]
) -> None:
    """What ends is whole, what is cut off may go on."""
    whole: list[str] = []
    for question, text in zip(asked, plain, strict=True):
        if "grammar" in question.limits:
            matcher = LLMatcher(grammars.tokenizer, question.limits["grammar"])
            assert matcher.consume_tokens(list(text))
            has_ended = text[-1] in ends
            assert has_ended or len(text) == NEW_TOKENS
            whole.append(tokenizer.decode(text, skip_special_tokens=True) if has_ended else "")
    for answer in filter(None, whole[:2]):
        person = json.loads(answer)
        assert person.keys() == PERSON["properties"].keys()
        assert person["profession"] in ("teacher", "carpenter", "astronomer")
        assert 0 <= person["age"] <= 130
    assert all(re.fullmatch(FORMS[2]["guided_regex"], answer) for answer in filter(None, whole[4:6]))
    assert all(answer in FORMS[3]["guided_choice"] for answer in whole[6:8])
    assert sum(map(bool, whole)) >= 7


@pytest.mark.parametrize("strategy", EVERY)
def test_with_every_strategy_it_is_what_plain_decoding_gives(
    strategy: str, asked: list[Question], plain: list[Text], plain_bf16: list[Text], verifier: BatchedVerifier,
    verifier_bf16: BatchedVerifier, drafters: list[BatchedDrafter],
) -> None:  # fmt: skip
    assert answered_by(strategy, asked, verifier, drafters, NEW_TOKENS) == plain
    assert answered_by(strategy, asked, verifier_bf16, drafters, NEW_TOKENS) == plain_bf16


def test_sharing_steps_and_losing_the_verifier_changes_nothing(
    asked: list[Question], plain_bf16: list[Text], verifier_bf16: BatchedVerifier,
    drafters: list[BatchedDrafter], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whoever takes a session up begins its form where the text is."""
    monkeypatch.setattr(loop, "_FAILOVER_DELAY_S", 0.0)
    assert answer_all(asked, verifier_bf16, drafters, off, NEW_TOKENS) == plain_bf16
    assert answer_all(asked, Losing(verifier_bf16, 3), drafters, mixed(), NEW_TOKENS) == plain_bf16


async def passes(verifier: BatchedVerifier, question: Question) -> tuple[Text, int]:
    """Plain decoding to the end, and how many passes that took."""
    async with verifier.session() as session:
        state = SessionState(
            question.prompt, sampling=question.params, max_tokens=NEW_TOKENS, **question.limits
        )
        tokens = list((await session.prefill(state, 1)).tokens)
        count = 1
        while tokens[-1] not in question.limits["end_tokens"] and len(tokens) < NEW_TOKENS:
            verdict = await session.verify(ProposalTree.root_only(tokens[-1]))
            tokens += verdict.tokens
            assert verdict.checked is not None
            assert len(verdict.checked) == verdict.num_nodes + 1
            count += 1
        return tuple(tokens), count


def test_what_must_come_is_drafted_for_nothing(
    asked: list[Question], plain: list[Text], verifier: BatchedVerifier
) -> None:
    """Names of properties, and the rest of a choice once it is known."""
    text, count = asyncio.run(passes(verifier, asked[0]))
    assert text == plain[0]
    assert count < 0.7 * len(text)


def test_what_may_not_come_is_not_checked(grammars: Grammars, tokenizer: Any) -> None:
    grammar = grammar_of({"guided_regex": "[ab]{1,8}"})
    a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "abc")
    text = grammars.open(grammar)
    nodes = [
        (a, 0, -0.1, 1),
        (c, 0, -0.2, 2),
        (b, 1, -0.3, 3),
        (a, 2, -0.4, 4),
        (c, 3, -0.5, 5),
        (b, 3, -0.6, 6),
    ]
    tree = ProposalTree.ordered(7, nodes, 7)
    kept = text.drafts(tree)
    assert (kept.tokens, kept.parents, kept.owners) == ((7, a, b, b), (-1, 0, 1, 2), (0, 1, 3, 6))
    allowed = text.allowed(kept)
    assert allowed.shape == (4, len(tokenizer))
    assert [bool(row[token]) for row in allowed for token in (a, b, c)] == [True, True, False] * 4
    assert text.drafts(tree) == kept, "the text is where it was"


def test_what_is_forced_takes_the_trees_place(grammars: Grammars, tokenizer: Any) -> None:
    text = grammars.open(grammar_of({"guided_choice": ["the only answer there is"]}))
    tree = text.drafts(ProposalTree.ordered(7, [(5, 0, -0.1, 1)], 2))
    assert tree.tokens[0] == 7
    assert (
        tokenizer.decode(tree.tokens[1:])
        == "the only answer there is"[: len(tokenizer.decode(tree.tokens[1:]))]
    )
    assert len(tree) > 2
    assert set(tree.owners) == {0}


def test_a_text_that_has_all_it_may_have_can_only_end(
    grammars: Grammars, tokenizer: Any, ends: tuple[int, ...]
) -> None:
    text = grammars.open(grammar_of({"guided_choice": ["yes"]}), tokenizer("yes")["input_ids"])
    (allowed,) = text.allowed(ProposalTree.root_only(7))
    assert set(allowed.nonzero()[:, 0].tolist()) <= set(ends)
    assert allowed.any()


def test_a_text_that_left_its_grammar_and_a_grammar_that_is_none_are_said(grammars: Grammars) -> None:
    grammar = grammar_of({"guided_choice": ["yes"]})
    with pytest.raises(InvalidGrammar):
        grammars.open(grammar, [5, 5, 5])
    with pytest.raises(InvalidGrammar):
        grammars.open("no grammar")
    grammars.open(grammar)


def test_a_verifier_without_grammars_says_so() -> None:
    verifier = BatchedVerifier(Target(CausalLM(tiny_target()), 1, 64))

    async def prefill() -> None:
        async with verifier.session() as session:
            await session.prefill(SessionState((1, 2), grammar="some"), 1)

    with pytest.raises(InvalidGrammar, match="no grammars"):
        asyncio.run(prefill())
    verifier.close()


def test_a_tokenizer_that_knows_no_grammars_is_said() -> None:
    def slow_tokenizer() -> LLTokenizer:
        raise ValueError("only fast tokenizers")

    with pytest.raises(InvalidGrammar, match="only fast tokenizers"):
        Grammars(slow_tokenizer).open(grammar_of({"guided_choice": ["yes"]}))


def test_many_grammars_are_kept_but_not_all(grammars: Grammars) -> None:
    for n in range(100):
        grammars.open(grammar_of({"guided_regex": f"a{{1,{n + 1}}}"}))
    assert len(grammars._known) <= 64


def test_a_grammar_that_fails_is_its_own_sessions_answer(
    asked: list[Question], plain: list[Text], verifier: BatchedVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever shares the step goes on with the same text."""
    hard = asked[4]
    marked: list[TextState] = []
    count = 0

    def opening(
        grammars: Grammars, grammar: str, generated: Sequence[int] = (), opened: Any = Grammars.open
    ) -> TextState:
        state: TextState = opened(grammars, grammar, generated)
        marked.extend([state] * (grammar == hard.limits["grammar"]))
        return state

    def failing(state: TextState, tree: ProposalTree, allowed: Any = TextState.allowed) -> torch.Tensor:
        nonlocal count
        count += state in marked
        if state in marked and count > 2:
            raise InvalidGrammar("a limit of the parser")
        found: torch.Tensor = allowed(state, tree)
        return found

    monkeypatch.setattr(Grammars, "open", opening)
    monkeypatch.setattr(TextState, "allowed", failing)

    async def answers() -> Any:
        return await asyncio.gather(passes(verifier, hard), passes(verifier, asked[0]), return_exceptions=True)

    failed, (text, _) = asyncio.run(answers())
    assert isinstance(failed, InvalidGrammar)
    assert text == plain[0]
