"""Which specialists are up, and whether they fit the target: found in Serve's own status, never configured.

Knows Serve applications; nothing of sessions or requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.descriptions import SpecialistDescription, TargetDescription

_DEPLOYMENT = "Drafter"
_VERIFIER = "Verifier"
_STALE_S = 30.0
_DESCRIBE_TIMEOUT_S = 10.0
_UNSEEN_S = 300.0
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Specialist:
    name: str
    application: str
    handle: DeploymentHandle[Any]


class Directory:
    """The specialists that may be asked, and whether a verifier is up; refreshed every few seconds."""

    def __init__(
        self, target: TargetDescription, core: str, interval_s: float, expected: Sequence[str] = ()
    ) -> None:
        """Args: target: the verifier's description; core: the application the verifier is part of; expected:
        names that the configuration mentions.
        """
        self._target = target
        self._core = core
        self._interval_s = interval_s
        self._verifier_seen = float("-inf")
        self._unseen = set(expected)
        self._started = time.monotonic()
        self._known: dict[str, tuple[float, Specialist | None]] = {}  # application -> (deployed at, fitting)
        self._task: asyncio.Task[None] | None = None

    @property
    def specialists(self) -> dict[str, Specialist]:
        fitting = [specialist for _, specialist in self._known.values() if specialist is not None]
        return {specialist.name: specialist for specialist in sorted(fitting, key=lambda s: s.name)}

    @property
    def verifier_is_up(self) -> bool:
        """Whether a verifier replica ran when last looked, and that was not long ago."""
        return time.monotonic() - self._verifier_seen < _STALE_S

    def start(self) -> None:
        """Keep the directory fresh until the process ends."""
        self._task = asyncio.create_task(self._refresh_forever())

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception as error:  # whatever Serve answers, the next look may succeed
                logger.warning("the directory could not be refreshed: %r", error)
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> None:
        """Look for applications that run a drafter; ask each new one what it is."""
        applications = (await asyncio.to_thread(serve.status)).applications
        running = _is_running(applications.get(self._core), _VERIFIER)
        self._verifier_seen = time.monotonic() if running else float("-inf")
        drafters = {n: app for n, app in applications.items() if _DEPLOYMENT in app.deployments}
        self._known = {name: entry for name, entry in self._known.items() if name in drafters}
        new = {
            name: app.last_deployed_time_s
            for name, app in drafters.items()
            if app.status == "RUNNING" and self._known.get(name, (None, None))[0] != app.last_deployed_time_s
        }
        await asyncio.gather(*(self._meet(name, deployed_at) for name, deployed_at in new.items()))
        self._warn_of_the_unseen()

    def _warn_of_the_unseen(self) -> None:
        """Say once which configured specialists have never come up: a name may be misspelt."""
        self._unseen -= self.specialists.keys()
        if self._unseen and time.monotonic() - self._started > _UNSEEN_S:
            logger.warning(
                "router.drafters names %s, which no application serves; there are: %s",
                ", ".join(sorted(self._unseen)), ", ".join(self.specialists) or "none",
            )  # fmt: skip
            self._unseen.clear()

    async def _meet(self, application: str, deployed_at: float) -> None:
        """Remember the application's specialist; one that does not answer is asked again next time."""
        try:
            self._known[application] = (deployed_at, await self._look_at(application))
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("application %s does not say what it drafts: %r", application, error)

    async def _look_at(self, application: str) -> Specialist | None:
        """The application's specialist, or None when it does not fit this target."""
        handle: DeploymentHandle[Any] = serve.get_deployment_handle(_DEPLOYMENT, application)
        description: SpecialistDescription = await asyncio.wait_for(
            handle.describe.remote(), _DESCRIBE_TIMEOUT_S
        )
        if description.fingerprint not in (None, self._target.fingerprint):
            logger.error(
                "specialist %s drafts for another target (fingerprint %s, this one is %s): it is not used",
                description.name, description.fingerprint, self._target.fingerprint,
            )  # fmt: skip
            return None
        taken = self.specialists.get(description.name)
        if taken is not None and taken.application != application:
            logger.error(
                "application %s has a specialist named %s, as %s has: it is not used; rename one of them",
                application, description.name, taken.application,
            )  # fmt: skip
            return None
        logger.info("specialist %s (%s) joins", description.name, application)
        return Specialist(description.name, application, handle)


def _is_running(application: Any, deployment: str) -> bool:
    """Whether Serve's status shows a running replica."""
    if application is None or deployment not in application.deployments:
        return False
    return any(state == "RUNNING" for state in application.deployments[deployment].replica_states)
