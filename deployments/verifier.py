"""The verifier deployment: one replica runs the target for many leased sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from ray import serve

from deployments.channel import Handler, SessionServer, node_address
from deployments.config import TargetArgs, VerifierArgs, locate, torch_dtype
from deployments.messages import Message, from_verdict, to_tree
from taps.local import LocalVerifier
from taps.models.causal_lm import CausalLM, fingerprint
from taps.models.checkpoints import InvalidCheckpoint, target_fingerprint
from taps.models.embedded import target_path
from taps.sampling import SamplingParams
from taps.scheduling import StepBudget
from taps.target import Target


@serve.deployment
class Verifier:
    """Serves `taps.local.LocalVerifier` over sessions."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, target: TargetArgs, args: VerifierArgs
    ) -> None:
        torch.set_num_threads(args.torch_threads)
        path = target_path(locate(target.path))
        model = CausalLM.load(path, torch_dtype(target.dtype), target.device_map)
        self._fingerprint = self._fingerprint_of(path, model)
        budget = StepBudget(args.prefill_tokens, args.tree_nodes)
        self._verifier = LocalVerifier(Target(model, args.max_sessions, args.max_len, budget))
        await self._verifier.warm_up()
        self._server = SessionServer(self._open_session)
        await self._server.start(node_address())

    def _fingerprint_of(self, path: str, model: CausalLM) -> str:
        try:
            return target_fingerprint(path)
        except InvalidCheckpoint:  # no safetensors: no head fits it, but it can be served
            return fingerprint(model.embeddings)

    def describe(self) -> dict[str, Any]:
        """What the router and its drafters must know of the target."""
        model = self._verifier.target.model
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": model.hidden_size,
            "fingerprint": self._fingerprint,
            "max_tokens": self._verifier.target.max_tokens,
        }

    async def lease(self) -> AsyncIterator[Message]:
        async for grant in self._server.lease():
            yield grant

    @asynccontextmanager
    async def _open_session(self, hello: Message) -> AsyncIterator[Handler]:
        params = SamplingParams(**hello["sampling"])
        async with self._verifier.session(params) as session:

            async def handle(message: Message) -> Message:
                if "tree" in message:
                    return from_verdict(await session.verify(to_tree(message["tree"])))
                prompt = message["prefill"]
                return from_verdict(
                    await session.prefill(prompt["tokens"], prompt["num_generated"], prompt["feature_window"])
                )

            yield handle
