"""The router deployment: finds the verifier and the drafters, and puts the HTTP endpoints in front of them."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import RouterArgs, TargetArgs, locate
from deployments.descriptions import TargetDescription
from deployments.directory import Directory
from deployments.edge import Api
from deployments.endpoints import Endpoints
from deployments.generation import Generator
from deployments.metrics import Observer
from deployments.priority import take_a_place
from deployments.requests import RequestReader
from taps.models.embedded import target_path


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0.2})
@serve.ingress()
class Router:
    """Reads requests, generates on leased replicas and writes the answers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, verifier: DeploymentHandle[Any], target: TargetArgs, args: RouterArgs
    ) -> None:
        take_a_place()
        async with asyncio.timeout(args.start_deadline_s):
            self._target: TargetDescription = await verifier.describe.remote()
        core = serve.get_replica_context().app_name
        self._directory = Directory(self._target, core, args.discovery_interval_s, args.drafters or ())
        self._directory.start()
        self._endpoints = Endpoints(
            args,
            self._target,
            RequestReader(target_path(locate(target.path)), self._target, args),
            Generator(verifier, args, self._target.pass_seconds),
            self._directory,
            Observer(),
        )

    def __serve_build_asgi_app__(self) -> Api:
        """Called by Serve once this is initialised."""
        return self._endpoints.api()
