"""The cluster that the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.haproxy import SWITCH, with_haproxy
from tests.cluster import Cluster


@pytest.fixture(scope="package")
def environment() -> Iterator[dict[str, str]]:
    """What `make serve` starts Serve with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SWITCH, raising=False)
        chosen = with_haproxy(os.environ)
        for name, value in chosen.items():
            patch.setenv(name, value)
        yield chosen


@pytest.fixture(scope="package")
def cluster(
    environment: dict[str, str], target_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The shipped serve_config.yaml on a real Ray cluster, with a float32 target."""
    with Cluster.start(tmp_path_factory.mktemp("cluster")) as running:
        yield running
