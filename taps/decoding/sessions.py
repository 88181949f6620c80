"""What the loop asks of its peers: one session's side of a drafter and of a verifier.

Two small async protocols; whether a peer lives in this process or on another machine is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from taps.context import ContextDelta
from taps.drafting.drafter import Ask
from taps.lookup import Lookup
from taps.session import SessionState
from taps.tree import ProposalTree
from taps.verdict import Verdict


class DrafterSession(Protocol):
    """One session's side of a drafter."""

    index: int  # the bit that marks its nodes
    name: str
    is_at_hand: bool  # it answers at once, in this process, and needs no features

    @property
    def lookup(self) -> Lookup | None:
        """How a verifier that decodes plainly drafts the same by itself; None where it cannot."""
        ...

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        """Take in what the target decided since the last call and draft from the new root.

        Raises `PeerGone`.
        """
        ...


class ServedDrafter(Protocol):
    """Whatever gives sessions of a drafter."""

    @property
    def name(self) -> str: ...

    def session(self, index: int) -> AbstractAsyncContextManager[DrafterSession]:
        """A session until the block ends, whose nodes are marked by the bit `index`. Raises `PeerGone`."""
        ...


class Verifier(Protocol):
    """Whatever gives sessions of a verifier."""

    def session(self) -> AbstractAsyncContextManager[VerifierSession]:
        """A session until the block ends. Raises `PeerBusy` or `PeerGone`."""
        ...


class VerifierSession(Protocol):
    """One session's side of the verifier."""

    numerics: str  # verifiers of the same go on with the same bits

    async def prefill(self, state: SessionState, feature_window: int, tells: bool = True) -> Verdict:
        """Take a session up and decide one more token. Features are of that many positions at most.

        Args: tells: them now; else when `ahead` is stopped.
        """
        ...

    async def ahead(self, window: int, lookup: Lookup | None = None) -> Sequence[Verdict]:
        """Decode plainly: what was decided since the last call, one token at least.

        Passes without drafts come as one verdict, where they follow one another.
        The session goes on by itself for up to `window` tokens beyond, and tells no features. A window of 0
        stops it, and comes before `verify`: what is left, perhaps nothing, and the features not told, as far as
        they are wanted, with the last of them. Args: lookup: how it may draft beside, from the session's own
        text, where that pays. Raises `PeerGone`.
        """
        ...

    async def verify(self, tree: ProposalTree) -> Verdict:
        """Check a tree whose root is the token decided last. Raises `PeerGone`."""
        ...
