"""A session on the target and what it may be asked: to take up what was decided so far, or to check a tree.

Knows tokens and trees; nothing of steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from taps.engine.grammars import TextState
from taps.models.cache import CachedSequence
from taps.session import SessionState
from taps.tree import ProposalTree

_NOTHING = SessionState(())


@dataclass(eq=False)
class TargetSession:
    """One sequence being decoded: its place in the cache, which may lag behind its tokens."""

    sequence: CachedSequence
    asked: SessionState = _NOTHING  # as it was taken up
    tokens: list[int] = field(default_factory=list)  # all that are decided
    generated: Counter[int] = field(default_factory=Counter)  # how often each token was
    num_generated: int = 0
    num_reused: int = 0  # of its tokens, those that were in the cache when it was let in
    text: TextState | None = None  # where a grammar says what may come

    def take_up(self, state: SessionState, text: TextState | None = None) -> None:
        """Args: text: the generated part of `state`, where that has a grammar."""
        self.asked, self.text = state, text
        self.tokens = list(state.tokens)
        self.generated = state.counts()
        self.num_generated = state.num_generated

    def extend(self, tokens: tuple[int, ...]) -> None:
        self.tokens += tokens
        self.generated.update(tokens)
        self.num_generated += len(tokens)
        if self.text is not None:
            self.text.extend(tokens)

    def drafts(self, tree: ProposalTree) -> ProposalTree:
        """What of a tree is worth checking."""
        return tree if self.text is None else self.text.drafts(tree)

    @property
    def is_over(self) -> bool:
        """Whether nothing more of the text is asked for."""
        return self.asked.is_over(self.tokens[-1], self.num_generated)

    @property
    def looks_back(self) -> bool:
        """Whether more than its logits decides a token: what was decided before it, in the same step too."""
        asked = self.asked
        return asked.sampling.penalised or bool(asked.bad_words) or self.num_generated < asked.min_tokens

    def counts(self, accepted: Sequence[int]) -> Mapping[int, int]:
        """What penalties count. Args: accepted: in this step, on the way there."""
        if not (self.asked.sampling.penalised and accepted):
            return self.generated
        counted = self.generated.copy()  # a sum of counters would drop the prompt's zeros
        counted.update(accepted)
        return counted

    def excluded(self, accepted: Sequence[int]) -> Collection[int]:
        """What may not come next. Args: accepted: in this step, on the way there."""
        num_generated = self.num_generated + len(accepted)
        longest = max(map(len, self.asked.bad_words), default=0)
        return self.asked.excluded((*self.tokens[len(self.tokens) - longest :], *accepted), num_generated)

    @property
    def num_left(self) -> int:
        """Tokens that may still be decided; one always, for whoever asks for it."""
        return max(self.asked.max_tokens - self.num_generated, 1)


@dataclass(eq=False)
class PrefillJob:
    """Take a session up where `state` says it is; a verdict with one token when all tokens are in the cache."""

    session: TargetSession
    state: SessionState
    feature_window: int = 1 << 30  # return at most this many of the newest features
    text: TextState | None = None  # its generated part, where it has a grammar

    @property
    def num_missing(self) -> int:
        """Tokens that are to come into the cache before anything is decided, that step's own included."""
        return len(self.state.tokens) - self.session.sequence.length


@dataclass(eq=False)
class VerifyJob:
    """Check one proposal tree, whose root is the token decided last."""

    session: TargetSession
    tree: ProposalTree

    @property
    def num_missing(self) -> int:
        """Tokens before the root that a paused session lacks in the cache."""
        return len(self.session.tokens) - 1 - self.session.sequence.length


Job: TypeAlias = PrefillJob | VerifyJob
