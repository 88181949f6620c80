"""Which specialists are up, and whether they fit the target: found in Serve's own status, never configured.

Knows Serve applications; nothing of sessions or requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.descriptions import SpecialistDescription, TargetDescription

_DEPLOYMENT = "Drafter"
_VERIFIER = "Verifier"
_STALE_S, _STALE_PAUSES = 30.0, 2.0  # and no sooner than after so many of the longest pauses between looks
_DESCRIBE_TIMEOUT_S = 10.0
_UNSEEN_S = 300.0
# Serve's status takes a tenth of a second of a core, and holds up all else here: where all is in order and
# stays so, looks grow rarer.
RAREST, _RARER = 7.0, 1.2  # times the interval at most, and times the pause before
# An application that is unhealthy or being deleted has no specialist to offer.
_SERVING = ("RUNNING", "DEPLOYING")
# A deployment that is in order may have no replica: scaled to zero, its first request starts one.
_IN_ORDER = ("HEALTHY", "UPSCALING", "DOWNSCALING")
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Specialist:
    name: str
    application: str
    handle: DeploymentHandle[Any]
    draft_seconds: Mapping[int, float] = field(default_factory=dict)  # as it said


@dataclass(frozen=True)
class Met:
    """An application that said what it drafts."""

    application: str
    description: SpecialistDescription
    is_up: bool


@dataclass(frozen=True)
class Roster:
    """Whom requests may ask."""

    taken: Mapping[str, str] = field(default_factory=dict)  # name -> application, in order of names
    away: frozenset[str] = frozenset()  # names of those that fit and are not up now
    refused: Mapping[str, str] = field(default_factory=dict)  # application -> why


def roster_of(target: TargetDescription, met: Iterable[Met]) -> Roster:
    """Who of those up fits the target, one for each name: decided anew at every look, by nothing else.

    Of several applications with one name the one that is called so itself is taken, else the first by name.
    """
    refused: dict[str, str] = {}
    taken: dict[str, str] = {}
    away: set[str] = set()
    for one in sorted(met, key=lambda m: (m.application != m.description.name, m.application)):
        name = one.description.name
        if (reason := _misfit(target, one.description)) is not None:
            refused[one.application] = reason
        elif not one.is_up:
            away.add(name)
        elif name in taken:
            refused[one.application] = f"application {taken[name]} has that name too: rename one of them"
        else:
            taken[name] = one.application
    return Roster(dict(sorted(taken.items())), frozenset(away - taken.keys()), refused)


def _misfit(target: TargetDescription, specialist: SpecialistDescription) -> str | None:
    """Why a specialist cannot draft for the target; None where it can."""
    if specialist.fingerprint not in (None, target.fingerprint):
        return (
            f"it drafts for another target (fingerprint {specialist.fingerprint}, this one is "
            f"{target.fingerprint}): train a head for this one, or name its target"
        )
    if specialist.max_tokens is not None and specialist.max_tokens < target.max_tokens:
        short = target.max_tokens - specialist.max_tokens
        return (
            f"its cache holds {specialist.max_tokens} tokens of a session, the verifier's sessions have up to "
            f"{target.max_tokens}: raise its max_len by {short} or more"
        )
    return None


class Directory:
    """The specialists that may be asked, and whether a verifier is up; looked for every few seconds."""

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
        self._expected = frozenset(expected)
        self._unseen = set(expected)
        self._started = time.monotonic()
        self._said: dict[str, tuple[float, SpecialistDescription]] = {}  # application -> (deployed at, what)
        self._roster = Roster()
        self._seen: dict[str, dict[str, Any]] = {}  # what Serve said last of each application, in short
        self._handles: dict[str, DeploymentHandle[Any]] = {}  # by application
        self._task: asyncio.Task[None] | None = None

    @property
    def specialists(self) -> dict[str, Specialist]:
        """Those that are up, by name."""
        taken = self._roster.taken.items()
        return {
            name: Specialist(name, app, self._handles[app], self._said[app][1].draft_seconds)
            for name, app in taken
        }

    @property
    def away(self) -> frozenset[str]:
        """Names of those that were up and are not now: a request may name them, and goes on without."""
        return self._roster.away

    def told(self) -> dict[str, Any]:
        """As JSON has it: applications with their replicas, and the specialists that were found among them."""
        up = [{"name": n, "application": app, "state": "up"} for n, app in self._roster.taken.items()]
        away = [{"name": name, "state": "away"} for name in sorted(self._roster.away)]
        refused = [
            {"name": self._said[app][1].name, "application": app, "state": "refused", "reason": reason}
            for app, reason in sorted(self._roster.refused.items())
            if app in self._said
        ]
        return {"applications": self._seen, "specialists": [*up, *away, *refused]}

    @property
    def verifier_is_up(self) -> bool:
        """Whether sessions could be had of the verifier when last looked, and that was not long ago."""
        stale_s = max(_STALE_S, _STALE_PAUSES * RAREST * self._interval_s)
        return time.monotonic() - self._verifier_seen < stale_s

    def start(self) -> None:
        """Keep the directory fresh until the process ends."""
        self._task = asyncio.create_task(self._refresh_forever())

    async def _refresh_forever(self) -> None:
        pause_s = self._interval_s
        while True:
            before = self._roster
            try:
                await self.refresh()
            except Exception as error:  # whatever Serve answers, the next look may succeed
                logger.warning("the directory could not be refreshed: %r", error)
            pause_s = self._pause_s(pause_s, before)
            await asyncio.sleep(pause_s)

    def _pause_s(self, last_s: float, before: Roster) -> float:
        """Until the next look."""
        in_order = self.verifier_is_up and not self._roster.away and self._roster.taken.keys() >= self._expected
        if not in_order or self._roster != before:
            return self._interval_s
        return min(_RARER * last_s, RAREST * self._interval_s)

    async def refresh(self) -> None:
        """Look at the applications that run a drafter; ask each new one what it is."""
        applications = (await asyncio.to_thread(serve.status)).applications
        self._seen = {name: _in_short(application) for name, application in sorted(applications.items())}
        verifier = _deployment(applications.get(self._core), _VERIFIER)
        self._verifier_seen = time.monotonic() if _can_serve(verifier) else float("-inf")
        drafters = {n: app for n, app in applications.items() if _DEPLOYMENT in app.deployments}
        await asyncio.gather(
            *(self._meet(name, app) for name, app in drafters.items() if self._is_new(name, app))
        )
        # Requests come while it waits. One that is being deployed anew has no deployment for a moment.
        self._said = {name: said for name, said in self._said.items() if name in applications}
        self._handles = {name: handle for name, handle in self._handles.items() if name in applications}
        self._take([Met(n, what, _is_up(applications[n])) for n, (_, what) in self._said.items()])
        self._warn_of_the_unseen()

    def _is_new(self, application: str, status: Any) -> bool:
        """Whether it runs and has not said what it drafts since it was deployed."""
        deployed_at, _ = self._said.get(application, (None, None))
        is_new: bool = status.status == "RUNNING" and status.last_deployed_time_s != deployed_at
        return is_new

    async def _meet(self, application: str, status: Any) -> None:
        """Ask the application what it drafts; one that does not answer is asked again next time."""
        handle: DeploymentHandle[Any] = serve.get_deployment_handle(_DEPLOYMENT, application)
        try:
            description = await asyncio.wait_for(handle.describe.remote(), _DESCRIBE_TIMEOUT_S)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("application %s does not say what it drafts: %r", application, error)
            return
        self._handles[application] = handle
        self._said[application] = (status.last_deployed_time_s, description)

    def _take(self, met: Sequence[Met]) -> None:
        """Make the roster, and say what changed."""
        before, self._roster = self._roster, roster_of(self._target, met)
        names = {one.application: one.description.name for one in met}
        for name, application in self._roster.taken.items() - before.taken.items():
            logger.info("specialist %s (%s) joins", name, application)
        for name, application in before.taken.items() - self._roster.taken.items():
            logger.warning("specialist %s (%s) leaves", name, application)
        for application, reason in self._roster.refused.items() - before.refused.items():
            logger.error("specialist %s (%s) is not used: %s", names[application], application, reason)

    def _warn_of_the_unseen(self) -> None:
        """Say once which configured specialists have never come up: a name may be misspelt."""
        there = self._roster.taken
        self._unseen -= there.keys()
        if self._unseen and time.monotonic() - self._started > _UNSEEN_S:
            logger.warning(
                "router.drafters names %s, which no application serves; there are: %s",
                ", ".join(sorted(self._unseen)), ", ".join(there) or "none",
            )  # fmt: skip
            self._unseen.clear()


def _in_short(application: Any) -> dict[str, Any]:
    """What Serve says of an application: its state, and its replicas by theirs."""

    def plain(state: Any) -> str:  # which may be a member of an enumeration
        return str(getattr(state, "value", state))

    deployments = {
        name: {
            "status": plain(found.status),
            "replicas": {plain(state): count for state, count in found.replica_states.items()},
        }
        for name, found in application.deployments.items()
    }
    return {"status": plain(application.status), "deployments": deployments}


def _deployment(application: Any, name: str) -> Any:
    return None if application is None else application.deployments.get(name)


def _is_up(application: Any) -> bool:
    serves: bool = application.status in _SERVING
    return serves and _can_serve(_deployment(application, _DEPLOYMENT))


def _can_serve(deployment: Any) -> bool:
    """Whether Serve's status of a deployment promises an answer: a replica runs, or will when it is asked."""
    if deployment is None:
        return False
    promises: bool = deployment.status in _IN_ORDER or "RUNNING" in deployment.replica_states
    return promises
