"""The cluster that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster


@pytest.fixture(scope="package")
def cluster(target_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The shipped serve_config.yaml on a real Ray cluster, with a float32 target."""
    with Cluster.start(tmp_path_factory.mktemp("cluster")) as running:
        yield running
