"""The configuration: mistakes are refused with a reason, and the shipped file is free of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from deployments.config import Args, CoreArgs, SpecialistArgs, TreeArgs, VerifierArgs, locate, torch_dtype
from taps.composing import STRATEGIES

PROJECT = Path(__file__).resolve().parent.parent
BUILDERS: dict[str, type[Args]] = {
    "deployments.app:core": CoreArgs,
    "deployments.app:specialist": SpecialistArgs,
}


CONFIGS = ["serve_config.yaml", "cluster/serve_config.llama3-8b.yaml"]


@pytest.fixture(params=CONFIGS)
def shipped(request: pytest.FixtureRequest) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((PROJECT / request.param).read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize(
    ("args", "fields", "reason"),
    [
        (CoreArgs, {"verifer": {}}, "verifer"),
        (CoreArgs, {"verifier": {"max_session": 4}}, "max_session"),
        (CoreArgs, {"target": {"dtype": "float64"}}, "bfloat16"),
        (CoreArgs, {"router": {"propose_deadline_s": 0}}, "greater than 0"),
        (VerifierArgs, {"max_sessions": 0}, "greater than or equal to 1"),
        (VerifierArgs, {"cache_tokens": 2047}, "cache_tokens 2047 holds no session of max_len 2048"),
        (VerifierArgs, {"overcommit": 0.5}, "greater than or equal to 1"),
        (VerifierArgs, {"longest_step_ms": 0}, "greater than 0"),
        (VerifierArgs, {"tree_nodes": -1}, "greater than or equal to 0"),
        (TreeArgs, {"strategy": "best"}, "choose one of .*merged"),
        (TreeArgs, {"num_nodes": 257}, "less than or equal to 256"),
        (TreeArgs, {"depth": 0}, "greater than or equal to 1"),
        (TreeArgs, {"depth": 16, "top_k": 13}, r"depth \* top_k is 208, the most is 192"),
        (SpecialistArgs, {}, "name"),
        (SpecialistArgs, {"name": ""}, "at least 1 character"),
        (SpecialistArgs, {"name": "math"}, "needs `head`"),
        (SpecialistArgs, {"name": "copy", "kind": "ngram", "head": "x"}, "takes none"),
        (SpecialistArgs, {"name": "copy", "kind": "ngram", "device": "cuda"}, "leave out device"),
        (SpecialistArgs, {"name": "math", "kind": "medusa", "head": "x"}, "eagle"),
    ],
)
def test_a_mistake_is_refused_with_a_reason(args: type[Args], fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        args.model_validate(fields)


@pytest.mark.parametrize("fields", [{"name": "math", "head": "x"}, {"name": "copy", "kind": "ngram"}])
def test_a_specialist_has_a_head_or_needs_none(fields: dict[str, Any]) -> None:
    assert SpecialistArgs.model_validate(fields).name == fields["name"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_configured(strategy: str) -> None:
    assert TreeArgs(strategy=strategy).strategy == strategy


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_types_are_named_as_torch_names_them(name: Any) -> None:
    assert str(torch_dtype(name)) == f"torch.{name}"
    assert torch_dtype(name).is_floating_point


def test_a_directory_of_the_project_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("deployments") == str(PROJECT / "deployments")
    assert locate(str(tmp_path)) == str(tmp_path)
    assert locate("some-org/some-model") == "some-org/some-model"


def test_the_shipped_config_is_one_that_serve_takes(shipped: dict[str, Any]) -> None:
    parsed = ServeDeploySchema.model_validate(shipped)
    assert {app.import_path for app in parsed.applications} == set(BUILDERS)
    assert len({app.name for app in parsed.applications}) == len(parsed.applications)
    assert [app.route_prefix for app in parsed.applications].count("/") == 1


def test_the_arguments_of_the_shipped_config_are_ours(shipped: dict[str, Any]) -> None:
    for app in shipped["applications"]:
        BUILDERS[app["import_path"]].model_validate(app.get("args", {}))


def test_the_drafters_of_the_shipped_config_are_its_specialists(shipped: dict[str, Any]) -> None:
    core, *specialists = shipped["applications"]
    assert set(core["args"]["router"]["drafters"]) == {app["args"]["name"] for app in specialists}


def test_every_lease_of_the_shipped_config_has_a_slot(shipped: dict[str, Any]) -> None:
    """More leases than slots would be refused by the cache after Serve had granted them."""
    for app in shipped["applications"]:
        for deployment in app["deployments"]:
            if deployment["name"] != "Router":
                args = app["args"].get("verifier", {}) if deployment["name"] == "Verifier" else app["args"]
                slots = args.get("max_sessions", VerifierArgs().max_sessions)
                assert deployment["max_ongoing_requests"] <= slots
