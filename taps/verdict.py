"""What the target tells a session: a verdict, or that the session does not fit.

Knows tensors; nothing of how a verdict comes about, so whoever reads one need not load the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from taps.tree import ProposalTree


class PromptTooLong(ValueError):
    """The tokens do not fit a session's share of the cache."""


class InvalidGrammar(ValueError):
    """A text's grammar cannot be used, or was left; the message says why."""


class PassCost(NamedTuple):
    """What a pass cost, whoever shared it."""

    rows: int
    ms: float


class TokenLogprob(NamedTuple):
    """How likely a decided token was, in the distribution that it was drawn from."""

    own: float  # natural logarithm
    likeliest: tuple[tuple[int, float], ...]  # token ids, the likeliest first; of probability zero none


@dataclass(frozen=True)
class Verdict:
    """What a pass of the target decided for one session, or several passes without drafts."""

    tokens: tuple[int, ...]  # accepted drafted tokens, then the bonus token
    owners: tuple[int, ...]  # owner bits of the accepted drafted tokens
    features: Tensor  # [m, H] of the last m positions committed; row -1 is the one before tokens[-1]
    num_nodes: int  # drafted nodes that were checked, the root not counted
    depth: int  # of the tree that was checked
    batch_size: int  # sessions with a tree in the pass, the last one
    num_reused: int = 0  # of a prefill's tokens, those that had been computed before
    cost: PassCost | None = None  # of the last pass
    num_passes: int = 1  # of the target; several have no drafts, and decided one token each
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, where they were asked for
    # What was checked, where that is asked for or is not the beginning of the tree that was sent.
    checked: ProposalTree | None = None
