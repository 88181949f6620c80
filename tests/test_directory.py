"""The directory: who may be asked follows from what is up, by a fake Serve's status."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from deployments.descriptions import SpecialistDescription, TargetDescription
from deployments.directory import RAREST, Directory, Met, roster_of
from tests.fakes import until

TARGET = TargetDescription(vocab_size=100, fingerprint="ours", max_tokens=2000)
MATH = SpecialistDescription("math", "ours", 3904)


@dataclass
class FakeDeployment:
    replica_states: dict[str, int]
    status: str = "HEALTHY"


@dataclass
class FakeApplication:
    deployments: dict[str, FakeDeployment]
    status: str = "RUNNING"
    last_deployed_time_s: float = 1.0


@dataclass
class FakeServe:
    """Serve's status, and handles that answer `describe`."""

    applications: dict[str, FakeApplication] = field(default_factory=dict)
    descriptions: dict[str, SpecialistDescription | Exception] = field(default_factory=dict)
    described: list[str] = field(default_factory=list)

    def status(self) -> FakeServe:
        return self

    def get_deployment_handle(self, deployment: str, application: str) -> Any:
        assert deployment == "Drafter"
        return FakeHandle(self, application)

    def deploy(self, application: str, description: SpecialistDescription | Exception = MATH) -> None:
        self.applications[application] = FakeApplication({"Drafter": FakeDeployment({"RUNNING": 1})})
        self.descriptions[application] = description

    def apply(self, **changed: SpecialistDescription) -> None:
        """Every application has another time of deployment afterwards, those that changed another answer."""
        self.descriptions |= changed
        for application in self.applications.values():
            application.last_deployed_time_s += 1.0


class FakeHandle:
    def __init__(self, serve: FakeServe, application: str) -> None:
        self.application = application
        self.describe = self
        self._serve = serve

    async def remote(self) -> SpecialistDescription:
        self._serve.described.append(self.application)
        answer = self._serve.descriptions[self.application]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    fake.applications["core"] = FakeApplication({"Verifier": FakeDeployment({"RUNNING": 1})})
    monkeypatch.setattr("deployments.directory.serve", fake)
    return fake


@pytest.fixture
def directory(serve: FakeServe) -> Directory:
    return Directory(TARGET, "core", 0.0, ["math"])


def applications_of(directory: Directory) -> Mapping[str, str]:
    return {name: specialist.application for name, specialist in directory.specialists.items()}


async def test_a_specialist_joins_when_its_application_runs(serve: FakeServe, directory: Directory) -> None:
    serve.deploy("math")
    serve.applications["math"].status = "DEPLOYING"
    await directory.refresh()
    assert not directory.specialists
    serve.applications["math"].status = "RUNNING"
    await directory.refresh()
    assert applications_of(directory) == {"math": "math"}
    handle: Any = directory.specialists["math"].handle
    assert handle.application == "math"


async def test_it_tells_what_it_found(serve: FakeServe, directory: Directory) -> None:
    serve.deploy("math")
    serve.deploy("code", SpecialistDescription("code", "another target", 3904))
    await directory.refresh()
    told = directory.told()
    assert {"math", "code"} <= told["applications"].keys()
    assert told["applications"]["math"]["status"] == "RUNNING"
    states = {one["name"]: one["state"] for one in told["specialists"]}
    assert states == {"math": "up", "code": "refused"}
    assert "another target" in next(one["reason"] for one in told["specialists"] if one["name"] == "code")
    json.dumps(told)


async def test_an_application_is_asked_once_and_again_when_it_is_deployed_anew(
    serve: FakeServe, directory: Directory
) -> None:
    serve.deploy("math")
    for _ in range(3):
        await directory.refresh()
    assert serve.described == ["math"]
    serve.apply(math=SpecialistDescription("arithmetic", "ours", 3904))
    await directory.refresh()
    assert list(directory.specialists) == ["arithmetic"]


async def test_looks_grow_rarer_while_all_is_in_order_and_nothing_changes(serve: FakeServe) -> None:
    directory, pause_s = Directory(TARGET, "core", 2.0, ["math"]), 2.0

    async def look() -> float:
        before = directory._roster
        await directory.refresh()
        return directory._pause_s(pause_s, before)

    for _ in range(3):  # math is expected
        pause_s = await look()
        assert pause_s == 2.0
    serve.deploy("math")
    pauses = [pause_s := await look() for _ in range(20)]
    assert pauses[0] == 2.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2.0 * RAREST
    serve.deploy("chat", SpecialistDescription("chat", "ours", 3904))
    pause_s = await look()
    assert pause_s == 2.0
    pause_s = await look()
    assert pause_s > 2.0
    serve.applications["core"].deployments["Verifier"].replica_states = {}
    serve.applications["core"].deployments["Verifier"].status = "UNHEALTHY"
    assert await look() == 2.0


async def test_one_that_does_not_answer_is_asked_again(serve: FakeServe, directory: Directory) -> None:
    serve.deploy("math", RayServeException("starting"))
    serve.deploy("chat", SpecialistDescription("chat", "ours", 3904))
    await directory.refresh()
    assert list(directory.specialists) == ["chat"]
    serve.descriptions["math"] = MATH
    await directory.refresh()
    assert list(directory.specialists) == ["chat", "math"]


@pytest.mark.parametrize(
    ("application", "deployment", "replicas"),
    [
        ("UNHEALTHY", "UNHEALTHY", {}),
        ("UNHEALTHY", "UNHEALTHY", {"STARTING": 1, "STOPPING": 1}),
        ("UNHEALTHY", "UNHEALTHY", {"RUNNING": 1}),
        ("DEPLOYING", "UPDATING", {"STARTING": 1}),
        ("DELETING", "UPDATING", {"RUNNING": 1}),
        ("DEPLOY_FAILED", "DEPLOY_FAILED", {}),
    ],
)
async def test_a_specialist_that_cannot_serve_leaves_and_comes_back(
    application: str, deployment: str, replicas: dict[str, int],
    serve: FakeServe, directory: Directory,
) -> None:  # fmt: skip
    serve.deploy("math")
    await directory.refresh()
    well = serve.applications["math"]
    serve.applications["math"] = FakeApplication({"Drafter": FakeDeployment(replicas, deployment)}, application)
    await directory.refresh()
    assert not directory.specialists
    assert directory.away == {"math"}, "a request may still name it"
    serve.applications["math"] = well
    await directory.refresh()
    assert list(directory.specialists) == ["math"]
    assert not directory.away


async def test_a_specialist_whose_application_is_gone_is_forgotten(
    serve: FakeServe, directory: Directory
) -> None:
    serve.deploy("math")
    await directory.refresh()
    del serve.applications["math"]
    await directory.refresh()
    assert not directory.specialists
    assert not directory.away


@pytest.mark.parametrize(
    ("status", "replicas"),
    [
        ("HEALTHY", {}),
        ("UPSCALING", {"STARTING": 1}),
        ("DOWNSCALING", {"STOPPING": 1}),
        ("UPDATING", {"RUNNING": 1, "STARTING": 1}),
    ],
)
async def test_what_is_scaled_to_zero_or_rolls_over_is_up(
    status: str, replicas: dict[str, int], serve: FakeServe, directory: Directory
) -> None:
    serve.deploy("math")
    serve.applications["math"].deployments["Drafter"] = FakeDeployment(replicas, status)
    serve.applications["core"].deployments["Verifier"] = FakeDeployment(replicas, status)
    await directory.refresh()
    assert list(directory.specialists) == ["math"]
    assert directory.verifier_is_up


@pytest.mark.parametrize("replicas", [{}, {"STARTING": 1}])
async def test_a_verifier_without_replicas_that_is_not_in_order_is_not_up(
    replicas: dict[str, int], serve: FakeServe, directory: Directory
) -> None:
    await directory.refresh()
    assert directory.verifier_is_up
    lost = FakeDeployment(replicas, "UNHEALTHY")
    serve.applications["core"].deployments["Verifier"] = lost
    await directory.refresh()
    assert not directory.verifier_is_up


async def test_a_status_that_was_long_ago_says_nothing(
    serve: FakeServe, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr("deployments.directory.time.monotonic", lambda: clock)
    await directory.refresh()
    clock += 29.0
    assert directory.verifier_is_up
    clock += 2.0
    assert not directory.verifier_is_up


async def test_rare_looks_are_no_old_status(serve: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, clock = Directory(TARGET, "core", 10.0), 100.0
    monkeypatch.setattr("deployments.directory.time.monotonic", lambda: clock)
    await directory.refresh()
    clock += 1.5 * RAREST * 10.0
    assert directory.verifier_is_up
    clock += RAREST * 10.0
    assert not directory.verifier_is_up


async def test_a_look_that_fails_is_followed_by_another(
    serve: FakeServe, directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def status() -> FakeServe:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise RuntimeError("no controller")
        return serve

    serve.deploy("math")
    monkeypatch.setattr(serve, "status", status)
    directory.start()
    await until(lambda: bool(directory.specialists))
    assert looks > 1


async def test_of_two_with_one_name_one_is_taken_and_the_other_when_it_is_renamed(
    serve: FakeServe, directory: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    serve.deploy("algebra")
    serve.deploy("math")
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for _ in range(3):
            await directory.refresh()
    assert applications_of(directory) == {"math": "math"}
    assert len(caplog.records) == 1, "said once"
    assert "application math has that name too: rename one of them" in caplog.text
    serve.apply(math=SpecialistDescription("geometry", "ours", 3904))
    await directory.refresh()
    assert applications_of(directory) == {"geometry": "math", "math": "algebra"}


async def test_of_two_with_one_name_the_other_stands_in_while_the_first_is_away(
    serve: FakeServe, directory: Directory
) -> None:
    serve.deploy("algebra")
    serve.deploy("math")
    serve.applications["math"].status = "UNHEALTHY"
    await directory.refresh()
    assert applications_of(directory) == {"math": "algebra"}
    assert not directory.away


def test_the_roster_depends_on_nothing_but_what_is_up() -> None:
    met = [
        Met("a", MATH, True),
        Met("math", MATH, True),
        Met("b", SpecialistDescription("chat", "theirs", 3904), True),
        Met("c", SpecialistDescription("code", "ours", 3904), False),
        Met("d", SpecialistDescription("ngram"), True),
    ]
    rosters = [roster_of(TARGET, order) for order in permutations(met)]
    assert all(roster == rosters[0] for roster in rosters)
    assert rosters[0].taken == {"math": "math", "ngram": "d"}
    assert rosters[0].away == {"code"}
    assert set(rosters[0].refused) == {"a", "b"}


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (
            SpecialistDescription("math", "theirs", 3904),
            r"another target \(fingerprint theirs, this one is ours",
        ),
        (
            SpecialistDescription("math", "ours", 1999),
            "holds 1999 tokens .* up to 2000: raise its max_len by 1 or",
        ),
        (SpecialistDescription("math", "ours", 2000), None),
        (SpecialistDescription("math"), None),
    ],
)
async def test_one_that_does_not_fit_the_target_is_refused_with_what_to_do(
    description: SpecialistDescription, reason: str | None, serve: FakeServe, directory: Directory,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    serve.deploy("math", description)
    with caplog.at_level(logging.ERROR, "ray.serve"):
        await directory.refresh()
    assert list(directory.specialists) == (["math"] if reason is None else [])
    assert len(caplog.messages) == (reason is not None)
    assert re.search(reason or "^$", caplog.text)


async def test_a_configured_name_that_never_comes_up_is_said_once(
    serve: FakeServe, directory: Directory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = 0.0
    monkeypatch.setattr("deployments.directory.time.monotonic", lambda: clock)
    patient = Directory(TARGET, "core", 0.0, ["maths", "chat"])
    serve.deploy("chat", SpecialistDescription("chat", "ours", 3904))
    with caplog.at_level(logging.WARNING, "ray.serve"):
        await patient.refresh()
        assert not caplog.records
        clock = 301.0
        await patient.refresh()
        await patient.refresh()
    assert caplog.messages == ["router.drafters names maths, which no application serves; there are: chat"]
