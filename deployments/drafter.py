"""The drafter deployment: one specialist, an application of its own, for many leased sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from ray import serve

from deployments.channel import Handler, SessionServer, node_address
from deployments.config import SpecialistArgs, locate, torch_dtype
from deployments.messages import Message, from_tree, to_propose
from taps.drafting.drafter import Drafter as DrafterKind
from taps.drafting.eagle import EagleDrafter
from taps.drafting.ngram import NgramDrafter
from taps.local import LocalDrafter
from taps.models.checkpoints import load_head, target_fingerprint
from taps.models.embedded import target_path


@serve.deployment
class Drafter:
    """Serves `taps.local.LocalDrafter` over sessions."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: SpecialistArgs
    ) -> None:
        torch.set_num_threads(args.torch_threads)
        self._description: dict[str, Any] = {"name": args.name, "kind": args.kind}
        self._drafter = LocalDrafter(args.name, self._load(args))
        self._server = SessionServer(self._open_session)
        await self._server.start(node_address())

    def _load(self, args: SpecialistArgs) -> DrafterKind:
        if args.head is None:
            return NgramDrafter()
        target = target_path(locate(args.target))
        head = load_head(locate(args.head), target, torch_dtype(args.dtype))
        self._description["fingerprint"] = target_fingerprint(target)
        return EagleDrafter(head.to(args.device), args.max_sessions, args.max_len)

    def describe(self) -> dict[str, Any]:
        """Name and kind, and the fingerprint of the target a head was made for."""
        return self._description

    async def lease(self) -> AsyncIterator[Message]:
        async for grant in self._server.lease():
            yield grant

    @asynccontextmanager
    async def _open_session(self, hello: Message) -> AsyncIterator[Handler]:
        async with self._drafter.session() as session:

            async def handle(message: Message) -> Message:
                return from_tree(await session.propose(*to_propose(message)))

            yield handle
