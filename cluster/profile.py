"""Where a step's time goes: processor time for each token, of every process that answers, under a steady load.

    python -m cluster.profile --streams 16 --taps '{"strategy": "off"}' --out profile.json

Asks a running server of this machine in a closed loop, and reads what its processes used meanwhile. Where
`py-spy` is installed, it says which part of the router that was. Linux alone. Knows processes and stacks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.experiment import salt
from cluster.bench.load import Ask, Client, Loop, closed_loop
from cluster.bench.settings import server_at
from taps.evaluation.questions import load_questions
from taps.provenance import made_with, write_result

_TICKS = os.sysconf("SC_CLK_TCK")
_NAMES = {  # a process's title -> what it is called here
    ":Router": "router",
    ":Verifier": "verifier",
    ":Drafter": "drafters",
    "haproxy": "HTTP proxy",
    "ProxyActor": "HTTP proxy",
}
# Of a stack's frames, the innermost that is here says what it is for.
_PARTS = (
    (
        "links",
        ("deployments/link", "deployments/leasing", "deployments/messages", "deployments/sessions"),
    ),
    ("policy", ("taps/adaptive", "taps/composing", "taps/drafting")),
    ("loop", ("taps/decoding", "taps/context", "deployments/generation")),
    ("HTTP", ("deployments/", "/uvicorn/", "/starlette/", "/fastapi/", "/h11/", "httptools", "pydantic")),
    ("Serve", ("/ray/",)),
)
_WORKLOADS = Path(__file__).with_name("workloads")


def processes() -> dict[int, str]:
    """Process id -> what it is called here, of those that serve on this machine."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            title = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended
            continue
        name = next((name for part, name in _NAMES.items() if part in title), None)
        if name is not None and ("ServeReplica" in title or name == "HTTP proxy"):
            found[int(directory.name)] = name
    return found


def cpu_seconds(pid: int) -> float:
    """Used so far, in user and system mode; none where the process ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def shares(stacks: str) -> dict[str, float]:
    """The share of the samples that each part of a router has. Args: stacks: `py-spy record --format raw`."""
    counted: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, times = line.rpartition(" ")
        inner_first = frames.split(";")[::-1]
        places = [part for frame in inner_first for part, of in _PARTS if any(name in frame for name in of)]
        counted[places[0] if places else "event loop"] += int(times)
    whole = sum(counted.values())
    return {part: round(count / whole, 3) for part, count in counted.most_common()} if whole else {}


class _Sampler:
    """`py-spy` on one process, while the block lasts; does nothing where there is none."""

    def __init__(self, pid: int | None) -> None:
        self._program, self._pid = (
            shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
            pid,
        )
        self.shares: dict[str, float] = {}

    def __enter__(self) -> _Sampler:
        self._running: subprocess.Popen[bytes] | None = None
        if self._program and self._pid is not None:
            self._out = tempfile.NamedTemporaryFile(suffix=".txt")
            command = [self._program, "record", "--pid", str(self._pid), "--format", "raw", "--gil"]
            command += ["--rate", "200", "--duration", "3600", "--full-filenames", "--output", self._out.name]
            self._running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.send_signal(2)
            self._running.wait(60)
            self.shares = shares(Path(self._out.name).read_text())
            self._out.close()


async def measure(url: str, taps: Mapping[str, Any], streams: int, answers: int, tokens: int) -> dict[str, Any]:
    """Milliseconds of processor time for each token, by process, and the router's by part."""
    client = Client(url, (await server_at(url)).model, {"taps": dict(taps)})
    questions = [q.first_turn for path in sorted(_WORKLOADS.glob("*.jsonl")) for q in load_questions(path)]

    def asks(number: int) -> list[Ask]:
        return [Ask(str(n), questions[n % len(questions)], tokens, 0.0, n, salt()) for n in range(number)]

    try:
        await closed_loop(client, asks(2 * streams), streams)
        plain = await _observed(client, asks(answers), streams)
        router = next((pid for pid, name in processes().items() if name == "router"), None)
        with _Sampler(router) as sampler:
            await closed_loop(client, asks(answers), streams)
    finally:
        await client.close()
    return plain | {"router_shares": sampler.shares}


async def _observed(client: Client, asks: Sequence[Ask], streams: int) -> dict[str, Any]:
    names = processes()
    before = {pid: cpu_seconds(pid) for pid in names}
    loop: Loop = await closed_loop(client, asks, streams)
    failed = [answer.error for answer in loop.answers if answer.error]
    if failed:
        raise SystemExit(f"cluster.profile: {len(failed)} of {len(asks)} answers failed: {failed[0]}")
    generated = sum(answer.tokens for answer in loop.answers)
    used: dict[str, float] = {}
    for pid, name in names.items():
        ms = 1e3 * (cpu_seconds(pid) - before[pid]) / generated
        used[name] = round(used.get(name, 0.0) + ms, 3)
    return {
        "streams": streams,
        "tokens_per_s": round(generated / loop.seconds, 1),
        "cpu_ms_per_token": used | {"client": round(1e3 * loop.client_cpu_s / generated, 3)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--taps", type=json.loads, default={}, help="the `taps` of the requests, as JSON")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    found = asyncio.run(measure(args.url, args.taps, args.streams, args.answers, args.tokens))
    result = {**made_with(), "taps": args.taps, **found}
    if args.out:
        write_result(result, args.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
