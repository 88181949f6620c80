"""`taps serve`: starts a cluster from a configuration and says in a few lines how far it is.

    taps serve [serve_config.yaml]

What Ray and Serve log goes to a file that it names. Knows configurations, processes and what a router answers;
nothing of how answers come about.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from cluster.haproxy import private_directory
from deployments.config import shipped
from taps.models.embedded import EMBEDDED, embedded_target
from taps.models.kernel_operations import describe_kernel

# Ray would look for a cluster at the address that the last one left, also when that was killed; it would run
# its workers at niceness 15, and Serve's controller look at everything ten times a second.
SETTINGS = {"RAY_ADDRESS": "local", "RAY_worker_niceness": "0", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}
_LOOK_S = 0.5
_QUESTION = "What is 12 times 7?"
_SPECIALISTS_S = 120.0  # that are waited for once the target is up
_LAST_LINES = 15  # of the log, where it fails


class Expected(NamedTuple):
    """What a configuration promises."""

    url: str
    model: str
    target: str
    drafters: frozenset[str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Expected:
        """Raises KeyError or TypeError where it is not a configuration of ours."""
        http = config.get("http_options") or {}
        host = http.get("host", "127.0.0.1")
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{http.get('port', 8000)}"
        applications = config["applications"]
        (core,) = (one["args"] for one in applications if one["import_path"] == "deployments.app:core")
        drafters = [one["args"]["name"] for one in applications if one["import_path"].endswith(":specialist")]
        router = core.get("router") or {}
        if router.get("ngram") is not None:
            drafters.append(router["ngram"].get("name", "ngram"))
        target = (core.get("target") or {}).get("path", EMBEDDED)
        return cls(url, router.get("model_name", target), target, frozenset(drafters))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="taps serve", description="start a cluster and say when it is up")
    parser.add_argument("config", nargs="?", help="of Ray Serve (default: the shipped serve_config.yaml)")
    args = parser.parse_args(argv)
    path = Path(args.config) if args.config else shipped("serve_config.yaml")
    try:
        expected = Expected.of(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        print(f"taps serve: {path} is no configuration of a cluster: {error!r}", file=sys.stderr)
        return 1
    if is_taken(expected.url):
        print(f"taps serve: something answers at {expected.url} already: stop it, or change http_options.port",
              file=sys.stderr)  # fmt: skip
        return 1
    log = Path(private_directory(Path(f"/tmp/taps-{os.getuid()}"))) / "serve.log"
    say = _Telling()
    if expected.target == EMBEDDED:
        say("the embedded target (93 MB, fetched once)")
        embedded_target()
        say(f"CPU kernel: {describe_kernel().removeprefix('CPU kernel: ')}")
    say(f"starting Ray; what it logs goes to {log}")
    # A shell's job in the background ignores it, and so would the cluster, which is stopped by it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with log.open("wb") as out:
        environment = {**SETTINGS, **os.environ}
        # In a session of its own, so that Ctrl-C comes to it once, from here.
        running = subprocess.Popen(
            _command(path), stdout=out, stderr=out, env=environment, start_new_session=True
        )
    stopping = _Stopping(running, say)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopping)
    if watch(expected, lambda: running.poll() is None, say):
        say.up(expected, log)
    code = running.wait()
    if code and not stopping.is_asked:
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        print("\n".join(["taps serve: the cluster ended; the last of its log:", *lines]), file=sys.stderr)
        return 1
    return 0


def is_taken(url: str) -> bool:
    """Whether somebody listens there."""
    place = httpx.URL(url)
    try:
        socket.create_connection((place.host, place.port), timeout=5).close()
    except OSError:
        return False
    return True


class _Stopping:
    """What a signal does: the first has answers finished, as Serve does when interrupted; the next ends all."""

    def __init__(self, running: subprocess.Popen[bytes], say: Callable[[str], None]) -> None:
        self.is_asked = False
        self._running, self._say = running, say

    def __call__(self, *_: object) -> None:
        again, self.is_asked = self.is_asked, True
        self._say("ending at once" if again else "stopping, once answers are finished; again ends it at once")
        self._running.send_signal(signal.SIGTERM if again else signal.SIGINT)


def _command(config: Path) -> list[str]:
    """What runs the cluster, in this process's environment of Python."""
    serve = str(Path(sys.executable).with_name("serve"))
    return [sys.executable, "-m", "cluster.haproxy", serve, "run", str(config)]


class _Telling:
    """Lines with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s  {text}", flush=True)

    def up(self, expected: Expected, log: Path) -> None:
        body = json.dumps({"model": expected.model, "messages": [{"role": "user", "content": _QUESTION}]})
        print(
            f"\nup:       {expected.url}/v1, in OpenAI's format\n"
            f"page:     {expected.url}/\n"
            f"drafters: {', '.join(sorted(expected.drafters)) or 'none'}\n"
            f"log:      {log}\n"
            f"try:      curl {expected.url}/v1/chat/completions -d '{body}'\n"
            "stop:     Ctrl-C\n",
            flush=True,
        )


def watch(
    expected: Expected, runs: Callable[[], bool], say: Callable[[str], None], look_s: float = _LOOK_S
) -> bool:
    """Say what comes up until all is, or what is missing after a while; False where it ends before."""
    there: set[str] = set()
    give_up_at: float | None = None
    while runs():
        found = _health(expected.url)
        if found is not None:
            if give_up_at is None:
                say("the target is loaded, and HTTP is open")
                give_up_at = time.monotonic() + _SPECIALISTS_S
            for name in sorted(found - there):
                say(f"drafter {name} is up")
            there |= found
            if there >= expected.drafters:
                return True
            if time.monotonic() > give_up_at:
                say(f"not up, and not waited for any longer: {', '.join(sorted(expected.drafters - there))}")
                return True
        time.sleep(look_s)  # between two looks: a cluster that starts gives no sign to wait for
    return False


def _health(url: str) -> set[str] | None:
    """Drafters that are up; None while the target is not."""
    try:
        answer = httpx.get(f"{url}/health", timeout=5)
    except httpx.HTTPError:
        return None
    return set(answer.json()["drafters"]) if answer.status_code == 200 else None
