"""What is between clients and the router: HAProxy, as `make serve` starts it, where it is at hand.

What holds with it must hold with Serve's own proxy: tests/test_nodes.py tries that.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from cluster.haproxy import SWITCH
from tests.cluster import DRAFTERS, MODEL, Cluster

pytestmark = pytest.mark.serve
LISTENING, LOCALHOST = "0A", "0100007F"  # as the kernel writes them
REPLICA_PORTS = range(30000, 31000)
STATISTICS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
SHORT = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 4}
LONG = SHORT | {"max_tokens": 1500, "stream": True}


def test_haproxy_answers_where_it_is_at_hand(cluster: Cluster, environment: dict[str, str]) -> None:
    """It answers health checks itself; Serve's own proxy names its server."""
    answer = httpx.get(f"{cluster.url}/-/healthz", timeout=60)
    assert (answer.status_code, answer.text) == (200, "success")
    assert ("server" in answer.headers) == (environment[SWITCH] == "0")


def test_nothing_of_http_is_open_to_the_network(cluster: Cluster, environment: dict[str, str]) -> None:
    """As serve_config.yaml says. Replicas, too, listen where Serve gives clients a direct way to them."""
    statistics = [environment[name] for name in STATISTICS if name in environment]
    ours = {cluster.config["http_options"]["port"], *map(int, statistics)}
    replicas = set().union(*map(sockets, cluster.processes().values()))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    addresses = set()
    for _, local, _, state, *_, inode in (line[:10] for line in lines[1:]):
        address, port = local.split(":")
        of_replica = inode in replicas and int(port, 16) in REPLICA_PORTS
        if state == LISTENING and (int(port, 16) in ours or of_replica):
            addresses.add(address)
    assert addresses == {LOCALHOST}


def sockets(pid: int) -> set[str]:
    """Inodes of the sockets that a process has open."""
    links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    return {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}


def test_requests_with_long_headers_and_paths_are_answered(cluster: Cluster) -> None:
    answer = httpx.get(f"{cluster.url}/health", headers={"Cookie": "c" * 60_000}, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{cluster.url}/health?{'q' * 40_000}", timeout=60).status_code == 200


def test_a_stream_comes_chunk_by_chunk(cluster: Cluster) -> None:
    body = LONG | {"max_tokens": 100}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        asked = time.monotonic()
        came = [time.monotonic() - asked for _ in answer.iter_raw()]
    assert len(came) > 10
    assert came[0] < came[-1] / 4


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_free_their_sessions_at_once(cluster: Cluster, stream: bool) -> None:
    """Abandoned answers that would keep every session of the verifier for much longer than we wait."""
    for _ in range(20):
        if stream:
            with httpx.stream("POST", f"{cluster.url}/v1/completions", json=LONG, timeout=60) as answer:
                next(answer.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{cluster.url}/v1/completions", json=LONG | {"stream": False}, timeout=0.2)
    assert httpx.post(f"{cluster.url}/v1/completions", json=SHORT, timeout=30).status_code == 200


def test_a_killed_router_breaks_its_streams_and_comes_back(cluster: Cluster) -> None:
    victim = cluster.processes()["core.Router"]
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=LONG, timeout=60) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(chunks)
    cluster.wait_for_drafters(DRAFTERS)
    assert httpx.post(f"{cluster.url}/v1/completions", json=SHORT, timeout=60).status_code == 200
