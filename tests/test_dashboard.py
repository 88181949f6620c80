"""The dashboard: everything it shows is there to be shown, and no two panels lie on one another."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.dashboard import expressions, metrics_of, panels

SOURCES = "".join(path.read_text() for path in (PROJECT / "deployments").glob("*.py"))
KINDS = {
    "Counter": ("_total",),
    "Histogram": ("_bucket", "_count", "_sum"),
    "Gauge": ("",),
}


def _exported() -> set[str]:
    """Names that Prometheus knows our metrics by."""
    made = re.findall(r'metrics\.(\w+)\(\s*"(taps_\w+)"', SOURCES)
    return {f"ray_{name}{ending}" for kind, name in made for ending in KINDS[kind]}


def test_every_metric_it_asks_for_is_made() -> None:
    asked = metrics_of(expressions())
    assert asked
    assert asked <= _exported()


def test_every_metric_that_is_made_is_shown_and_documented() -> None:
    shown, text = " ".join(expressions()), (PROJECT / "docs" / "watching.md").read_text()
    for name in re.findall(r'metrics\.\w+\(\s*"(taps_\w+)"', SOURCES):
        assert f"ray_{name}" in shown, f"{name} is on no panel"
        assert f"`{name}`" in text, f"{name} is not explained"


def test_panels_lie_beside_one_another() -> None:
    places = [panel["gridPos"] for panel in panels()]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert len({panel["id"] for panel in panels()}) == len(places)


@pytest.mark.parametrize("panel", [p for p in panels() if p["type"] != "row"], ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, object]) -> None:
    assert panel["description"]
    assert str(panel["datasource"]).count("${datasource}") == 1


def test_the_dashboard_is_part_of_the_package() -> None:
    assert "dashboard.json" in (PROJECT / "pyproject.toml").read_text()
    assert json.loads(Path(PROJECT / "cluster" / "dashboard.json").read_text())["uid"] == "taps-cluster"
