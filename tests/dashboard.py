"""What the Grafana dashboard asks Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tests.conftest import PROJECT


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((PROJECT / "cluster" / "dashboard.json").read_text())["panels"]
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", ())]


def metrics_of(asked: Iterable[str]) -> set[str]:
    """Names of the metrics in these."""
    return {name for expression in asked for name in re.findall(r"ray_taps_\w+", expression)}
