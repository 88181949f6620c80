"""What replicas say of themselves when they are asked: a target, and a specialist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TargetDescription:
    """A verifier's."""

    vocab_size: int
    fingerprint: str  # of its input embeddings
    max_tokens: int  # prompt and generated tokens that fit a session
    pass_seconds: Mapping[int, float] = field(default_factory=dict)  # of a pass by its rows, as profiled
    numerics: str = ""  # names all that decides bits, and whether they depend on who shares a step


@dataclass(frozen=True)
class SpecialistDescription:
    """A drafter's."""

    name: str  # what requests and metrics call it
    fingerprint: str | None = None  # of the target its head was made for; None drafts for any
    max_tokens: int | None = None  # of a session that its cache holds; None is any number
    draft_seconds: Mapping[int, float] = field(default_factory=dict)  # by sessions that ask, as profiled
