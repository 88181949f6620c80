"""What a session has decided so far: its tokens, and the newest of the target's features.

Knows positions; nothing of who reads them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taps.session import SessionState
from taps.verdict import Verdict


@dataclass(frozen=True)
class ContextDelta:
    """News for a drafter: tokens it has not seen and the features that go with them.

    Feature i belongs to absolute position `feature_start + i`; `start + len(tokens)` tokens are decided, the
    last one (the root) has no feature yet.
    """

    start: int  # absolute position of tokens[0]
    tokens: tuple[int, ...]
    feature_start: int
    features: Tensor  # [m, H]

    @property
    def root(self) -> int:
        return self.tokens[-1]

    @property
    def end(self) -> int:
        """Tokens decided, the root included."""
        return self.start + len(self.tokens)


_NO_FEATURES = torch.empty(0, 0)


def _joined(chunks: Sequence[Tensor]) -> Tensor:
    """Mostly one, which is not copied."""
    if len(chunks) == 1:
        return chunks[0]
    return torch.cat(tuple(chunks)) if chunks else _NO_FEATURES


class Context:
    """Tokens of one session and a bounded window of features; no window where nobody drafts."""

    def __init__(self, begun: SessionState, feature_window: int) -> None:
        self._begun = begun
        self.tokens = list(begun.tokens)
        self.prompt_length = len(begun.tokens) - begun.num_generated
        self.feature_window = feature_window
        self._features: deque[Tensor] = deque()
        self._num_features = 0
        self._num_missing = 0  # newest positions whose features were not told

    @property
    def root(self) -> int:
        return self.tokens[-1]

    @property
    def is_complete(self) -> bool:
        """Whether the features of the newest positions are there, which drafters begin from."""
        return not self._num_missing or not self.feature_window

    @property
    def is_over(self) -> bool:
        """Whether nothing more of the text is asked for, stop strings aside."""
        return self._begun.is_over(self.root, self.num_generated)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def state(self) -> SessionState:
        """What another verifier goes on from."""
        return replace(self._begun, tokens=tuple(self.tokens), num_generated=self.num_generated)

    def extend(self, verdict: Verdict) -> None:
        """Take in what the target decided."""
        self.tokens += verdict.tokens
        self._num_missing += len(verdict.tokens)
        if not self.feature_window or not len(verdict.features):
            return
        if len(verdict.features) < self._num_missing:  # those before them are not known
            self._features.clear()
            self._num_features = 0
        newest = verdict.features
        if len(newest) > self._num_missing:
            newest = newest[-self._num_missing :]
        self._features.append(newest)
        self._num_features += len(newest)
        self._num_missing = 0
        while self._num_features - len(self._features[0]) >= self.feature_window:
            self._num_features -= len(self._features.popleft())

    def restart(self, verdict: Verdict) -> None:
        """Take in the verdict of a prefill of all tokens, whose features replace those known."""
        self._features.clear()
        self._num_features = 0
        self._num_missing = len(self.tokens)
        self.extend(verdict)

    def tokens_since(self, known: int) -> ContextDelta:
        """What happened after the first `known` tokens, without features."""
        end = len(self.tokens) - 1
        return ContextDelta(known, tuple(self.tokens[known:]), end, _NO_FEATURES)

    def since(self, known: int, feature_window: int | None = None) -> ContextDelta:
        """What happened after the first `known` tokens. Args: feature_window: less than this one's own.

        Features of the window's positions from `known - 1` on: the pair of a token and the feature before
        it is complete once the token is known.
        """
        first = len(self.tokens) - 1 - self._num_features
        window = self.feature_window if feature_window is None else min(feature_window, self.feature_window)
        wanted = max(known - 1, first, len(self.tokens) - 1 - window, 0)
        missing = len(self.tokens) - 1 - wanted
        newest: list[Tensor] = []
        for chunk in reversed(self._features):
            if missing <= 0:
                break
            newest.append(chunk[-missing:])
            missing -= len(newest[-1])
        features = _joined(newest[::-1])
        return ContextDelta(known, tuple(self.tokens[known:]), wanted, features)
