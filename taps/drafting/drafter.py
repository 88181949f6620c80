"""What every kind of drafter offers, and one session's job for it. Synchronous; batching is the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from taps.context import ContextDelta
from taps.engine.scheduling import MAX_LEN
from taps.shaping import SamplingParams
from taps.tree import ProposalTree

# Cache rows kept free for the levels of one tree: depth * top_k of an ask must not exceed it.
RESERVED_ROWS = 192
DRAFT_LEN = 2 * MAX_LEN  # by default: positions of a session, more than the target's
# The largest tree that may be asked for.
MOST_NODES, MOST_DEPTH, MOST_TOP_K = 256, 16, 32


@dataclass(frozen=True)
class Ask:
    """What the loop asks of each drafter in every step. The defaults are what pays on two cores."""

    num_nodes: int = 8  # nodes of a tree, root included
    depth: int = 4  # how many times the best nodes are extended: drafted paths have depth + 1 tokens
    top_k: int = 4  # children per node, and nodes extended per level
    sampling: SamplingParams | None = None  # couples the drafts to the target's noise; None ranks by q


# Li et al. 2406.16858, section 5, and TAPS: what acceptance lengths are measured with.
PAPER_ASK = Ask(num_nodes=60, depth=5, top_k=10)


@dataclass(eq=False)
class DraftJob:
    """Take in `delta`, then draft a tree from its root."""

    session: Any  # what the drafter's `open` returned
    delta: ContextDelta
    ask: Ask


class InvalidAsk(ValueError):
    """What a session told or asked its drafter cannot be drafted from; the message says why."""


class Drafter(Protocol):
    """A drafter with the state of its sessions. Not thread-safe: one thread calls it."""

    @property
    def in_kernel(self) -> bool:
        """Whether all that is large is computed by the CPU kernel, nothing by torch."""
        ...

    def open(self) -> Any:
        """A session; raises `taps.models.cache.CacheFull` when no more fit."""
        ...

    def close(self, session: Any) -> None: ...

    def profile(self) -> dict[int, float]:
        """Seconds of a usual draft by sessions that ask, measured now; nothing where that is no time."""
        ...

    def step(self, jobs: Sequence[DraftJob]) -> list[ProposalTree | Exception | None]:
        """A tree for every job, drafted together; an exception is that job's alone."""
        ...
