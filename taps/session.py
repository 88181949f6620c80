"""What a session is made of and how it goes on: all that any verifier needs to take it up.

Prefill, failover and pausing share it, so a session continues with the same text wherever it does. What later
shapes or ends an answer becomes a field here. Knows numbers; nothing of who decodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from taps.shaping import SamplingParams

UNLIMITED = 1 << 30
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class SessionState:
    """Tokens so far, and what was asked for."""

    tokens: tuple[int, ...]  # the prompt's and the generated ones
    num_generated: int = 0  # the last of `tokens`
    sampling: SamplingParams = GREEDY
    max_tokens: int = UNLIMITED  # that are generated at most, those there included
    end_tokens: tuple[int, ...] = ()  # after any of these nothing is decided
    min_tokens: int = 0  # that are generated before any of these may come
    bad_words: tuple[tuple[int, ...], ...] = ()  # runs of tokens that may not come
    grammar: str = ""  # that the text must keep to, as `llguidance` writes it
    num_logprobs: int | None = None  # likeliest tokens told beside each token's own log-probability
    tells_trees: bool = False  # every verdict has what was checked
    cache_salt: str = ""  # sessions of different salts share nothing that is cached

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.max_tokens - self.num_generated

    def is_over(self, newest: int, num_generated: int) -> bool:
        """Whether nothing comes after the newest token, with so many generated."""
        return num_generated >= self.max_tokens or (num_generated > 0 and newest in self.end_tokens)

    def counts(self) -> Counter[int]:
        """How often each token was generated, as penalties count; with the prompt's where they matter."""
        generated = Counter(self.tokens[len(self.tokens) - self.num_generated :])
        if self.sampling.repeats_cost:
            generated.update(dict.fromkeys(self.tokens, 0))
        return generated

    def excluded(self, newest: Sequence[int], num_generated: int) -> Collection[int]:
        """What may not come next. Args: newest: tokens, all there are or as many as bad words have."""
        found = {
            last for *before, last in self.bad_words if [*newest[max(len(newest) - len(before), 0) :]] == before
        }
        return found.union(self.end_tokens) if num_generated < self.min_tokens else found
