"""Messages: what goes over a link arrives as it was sent, or as the error it was."""

from __future__ import annotations

import dataclasses
import math

import msgpack
import pytest
import torch
from torch import Tensor

from deployments import messages
from deployments.messages import (
    Entry,
    Message,
    RemoteError,
    VersionMismatch,
    decode,
    encode,
    error_message,
    error_of,
    from_propose,
    from_tree,
    from_verdict,
    to_propose,
    to_tree,
    to_verdict,
)
from taps.context import ContextDelta
from taps.drafting.drafter import Ask
from taps.models.cache import CacheFull
from taps.sampling import InvalidLogits
from taps.shaping import SamplingParams
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import PromptTooLong, TokenLogprob, Verdict
from tests.fakes import chain

FEATURES = torch.tensor([[1.0, -2.5, 3e-5], [0.1, 65504.0, -0.0]])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sent(message: Message) -> Message:
    ((_, _, body),) = decode(encode([(1, "answer", message)]))
    assert body is not None
    return body


def same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def test_log_probabilities_arrive_with_their_tokens() -> None:
    told = TokenLogprob(-0.5, ((7, -0.25), (5, -0.5))), TokenLogprob(-math.inf, ())
    verdict = Verdict((5, 6), (), FEATURES, 0, 0, 1, logprobs=told)
    assert to_verdict(sent(from_verdict(verdict))).logprobs == told


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [FEATURES, FEATURES.T, FEATURES[:, 1:], FEATURES[:0]])
def test_a_verdict_arrives_as_it_was_sent(features: Tensor, dtype: torch.dtype) -> None:
    verdict = Verdict((5, 6), (3,), features.to(dtype), 7, 3, 2)
    arrived = to_verdict(sent(from_verdict(verdict)))
    assert same(arrived.features, verdict.features)
    assert dataclasses.replace(arrived, features=FEATURES) == dataclasses.replace(verdict, features=FEATURES)


def test_arrived_features_can_be_written_to() -> None:
    arrived = to_verdict(sent(from_verdict(Verdict((5,), (), FEATURES, 0, 0, 1))))
    arrived.features.add_(1.0)
    assert torch.equal(arrived.features, FEATURES + 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sampling",
    [None, SamplingParams(0.7, 0.9, 40, 0.5, -0.5, seed=2**64 - 1, choice=3)],
    ids=["plain", "coupled"],
)
def test_a_proposal_request_arrives_as_it_was_sent(sampling: SamplingParams | None, dtype: torch.dtype) -> None:
    delta = ContextDelta(40, (7, 8, 9), 39, FEATURES.to(dtype))
    arrived, ask = to_propose(sent(from_propose(delta, Ask(24, 5, 6, sampling))))
    assert ask == Ask(24, 5, 6, sampling)
    assert same(arrived.features, delta.features)
    assert (arrived.start, arrived.tokens, arrived.feature_start) == (40, (7, 8, 9), 39)


@pytest.mark.parametrize("tree", [chain(5, 6, 7), ProposalTree.root_only(49_151)])
def test_a_tree_arrives_as_it_was_sent(tree: ProposalTree) -> None:
    assert to_tree(sent(from_tree(tree))) == tree


def test_a_tree_that_is_none_is_refused_on_arrival() -> None:
    with pytest.raises(InvalidTree):
        to_tree(sent({**from_tree(chain(5, 6)), "parents": [-1, 1, 0]}))


@pytest.mark.parametrize("version", [0, messages.VERSION + 1, None])
def test_another_version_is_refused_with_what_to_do(version: int | None) -> None:
    with pytest.raises(VersionMismatch, match=rf"version {messages.VERSION} .*{version}.*redeploy"):
        decode(msgpack.packb([version, ["what no version has said yet"]]))


def test_a_frame_holds_entries_of_many_sessions() -> None:
    entries: list[Entry] = [
        (1, "open", {"secret": "s", "hello": {}}),
        (70_000, "end", None),
        (0, "at work", None),
    ]
    assert list(decode(encode(entries))) == entries


@pytest.mark.parametrize("kind", [CacheFull, PromptTooLong, InvalidTree, InvalidLogits])
def test_an_error_has_its_type_and_text_again(kind: type[Exception]) -> None:
    error = error_of(sent(error_message(kind("all 16 slots are in use"))))
    assert type(error) is kind
    assert str(error) == "all 16 slots are in use"


@pytest.mark.parametrize("error", [KeyError("depth"), SystemError("x"), RemoteError("y")])
def test_an_error_of_no_known_type_says_what_it_was(error: Exception) -> None:
    arrived = error_of(sent(error_message(error)))
    assert type(arrived) is RemoteError
    assert type(error).__name__ in str(arrived)
