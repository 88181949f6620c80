"""How a running server fares, for a terminal: what `/status` says.

    taps status [--url http://127.0.0.1:8000]

Knows the JSON that a router answers; nothing of how it comes about.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="taps status", description="how a running server fares")
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server (default: %(default)s)")
    args = parser.parse_args(argv)
    url = args.url.rstrip("/")
    try:
        answer = httpx.get(f"{url}/status", timeout=_TIMEOUT_S)
        answer.raise_for_status()
        told = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = f"taps status: {url} does not answer: {error}; is it up? start one with `make serve`"
        print(reason, file=sys.stderr)
        return 1
    print(f"{url}: {told['status']}")
    print("\n".join(lines(told)))
    return 0 if told["status"] == "ok" else 1


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Args: told: what `/status` answers."""
    router = told["router"]
    yield f"{told['model']}, {told['numerics']}"
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(router["requests"].items()))
    yield (
        f"answering {router['answering']} now, {router['tokens_per_second']:.1f} tokens/s; since "
        f"{_clock(router['since'])} {router['tokens']} tokens" + (f", requests: {outcomes}" if outcomes else "")
    )
    yield "\ndrafters"
    states = {one["name"]: one for one in told["specialists"]}
    for name in sorted({*states, *told["drafters"]}):
        one = states.get(name, {"state": "in the router"})
        counts = router["drafters"].get(name)
        share = f"  accepted {counts['accepted']} of {counts['drafted']}" if counts else ""
        yield f"  {name:12} {one['state']:14}{share}" + (f"  {one['reason']}" if "reason" in one else "")
    yield "\napplications"
    for name, application in told["applications"].items():
        replicas = (
            f"{deployment} {'+'.join(f'{n} {state}' for state, n in found['replicas'].items()) or 'none'}"
            for deployment, found in application["deployments"].items()
        )
        yield f"  {name:12} {application['status']:14} {', '.join(replicas)}"
    if router["refusals"]:
        yield "\nrefused"
        for refusal in router["refusals"]:
            yield f"  {_clock(refusal['at'])} {refusal['reason']}"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
