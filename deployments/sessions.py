"""Verifier and drafter sessions on leased replicas, both ends: what the loop holds and what answers it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.leasing import Handler
from deployments.linking import LinkPool, RemoteSession
from deployments.messages import (
    Message,
    from_ahead,
    from_prefill,
    from_propose,
    from_tree,
    from_verdict,
    to_ahead,
    to_prefill,
    to_propose,
    to_tree,
    to_verdict,
)
from taps.context import ContextDelta
from taps.decoding.sessions import DrafterSession, VerifierSession
from taps.drafting.drafter import Ask, InvalidAsk
from taps.lookup import Lookup
from taps.peers import PeerGone
from taps.sampling import InvalidLogits
from taps.session import SessionState
from taps.tree import InvalidTree, ProposalTree
from taps.verdict import PromptTooLong, Verdict


class RemoteVerifierSession:
    """Implements `taps.decoding.sessions.VerifierSession`."""

    def __init__(self, session: RemoteSession, timeout_s: float) -> None:
        self.numerics = session.numerics
        self._session = session
        self._timeout_s = timeout_s

    async def prefill(self, state: SessionState, feature_window: int, tells: bool = True) -> Verdict:
        return await self._ask(from_prefill(state, feature_window, tells))

    async def verify(self, tree: ProposalTree) -> Verdict:
        return await self._ask({"tree": from_tree(tree)})

    async def ahead(self, window: int, lookup: Lookup | None = None) -> list[Verdict]:
        answer = await self._session.ask(from_ahead(window, lookup), self._timeout_s)
        return [to_verdict(message) for message in answer["verdicts"]]

    async def _ask(self, message: dict[str, Any]) -> Verdict:
        return to_verdict(await self._session.ask(message, self._timeout_s))


class RemoteDrafterSession:
    """Implements `taps.decoding.sessions.DrafterSession`."""

    is_at_hand = False
    lookup = None

    def __init__(self, session: RemoteSession, name: str, index: int, timeout_s: float) -> None:
        self.name = name
        self.index = index
        self._session = session
        self._timeout_s = timeout_s

    async def propose(self, delta: ContextDelta, ask: Ask) -> ProposalTree:
        with _left_out_on_failure():
            return to_tree(await self._session.ask(from_propose(delta, ask), self._timeout_s))


def answering_verifier(session: VerifierSession) -> Handler:
    """What a verifier replica answers a `RemoteVerifierSession`."""

    async def answer(message: Message) -> Message:
        if "tree" in message:
            return from_verdict(await session.verify(to_tree(message["tree"])))
        if "ahead" in message:
            verdicts = await session.ahead(*to_ahead(message))
            return {"verdicts": [from_verdict(verdict) for verdict in verdicts]}
        return from_verdict(await session.prefill(*to_prefill(message)))

    return answer


def answering_drafter(session: DrafterSession) -> Handler:
    """What a drafter replica answers a `RemoteDrafterSession`."""

    async def answer(message: Message) -> Message:
        return from_tree(await session.propose(*to_propose(message)))

    return answer


@contextmanager
def _left_out_on_failure() -> Iterator[None]:
    """A drafter that answers with any error is gone; it never fails a request."""
    try:
        yield
    except (PromptTooLong, InvalidTree, InvalidLogits, InvalidAsk) as error:
        raise PeerGone(str(error)) from error


@asynccontextmanager
async def drafter_session(
    pool: LinkPool, handle: DeploymentHandle[Any], name: str, index: int,
    lease_timeout_s: float, step_timeout_s: float,
) -> AsyncIterator[RemoteDrafterSession]:  # fmt: skip
    """A session on a leased drafter replica. Raises `PeerGone` when there is none to be had."""
    with _left_out_on_failure():
        async with pool.session(handle, {}, lease_timeout_s) as session:
            yield RemoteDrafterSession(session, name, index, step_timeout_s)
