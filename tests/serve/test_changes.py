"""The running system while it changes: readers go, replicas are killed, join, scale and share a machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from deployments.config import RouterArgs
from deployments.directory import RAREST
from tests.cluster import DRAFTERS, Cluster, ask, eventually, streamed_text, text_of

pytestmark = pytest.mark.serve


def test_an_abandoned_stream_frees_its_sessions(cluster: Cluster) -> None:
    """Many more abandoned streams than the verifier has sessions: later requests still get one."""
    for _ in range(20):
        stream = ask(cluster, stream=True, max_tokens=400)
        next(iter(stream))
        stream.close()
    assert len(text_of(cluster)) > 0


def test_killing_a_specialist_leaves_the_stream_alive_and_its_text_unchanged(cluster: Cluster) -> None:
    kill_in_mid_answer(cluster, "math.Drafter")
    cluster.wait_for_drafters(DRAFTERS)


def test_a_lost_verifier_is_replaced_and_the_stream_goes_on_with_the_same_text(cluster: Cluster) -> None:
    victim = kill_in_mid_answer(cluster, "core.Verifier")
    assert cluster.processes()["core.Verifier"] != victim


def kill_in_mid_answer(cluster: Cluster, name: str) -> int:
    """Kill a replica while an answer streams, which must come as if nothing had been; returns its process."""
    plain = text_of(cluster, max_tokens=64)
    victim = cluster.processes()[name]
    stream = iter(ask(cluster, stream=True, max_tokens=64))
    text = streamed_text([next(stream) for _ in range(3)])
    os.kill(victim, signal.SIGKILL)
    assert text + streamed_text(stream) == plain
    return victim


def test_a_specialist_joins_the_running_cluster(cluster: Cluster) -> None:
    before = cluster.processes()
    plain = text_of(cluster, max_tokens=64)
    joined = threading.Event()
    texts: list[str] = []

    def keep_streaming() -> None:
        while not joined.is_set():
            texts.append(streamed_text(ask(cluster, stream=True, max_tokens=64)))

    reader = threading.Thread(target=keep_streaming)
    reader.start()
    try:
        config = cluster.changed()
        third = cluster.changed()["applications"][-1]
        third.update(name="lookup", args={"name": "lookup", "kind": "ngram"})
        config["applications"].append(third)
        cluster.apply(config)
        cluster.wait_for_drafters(DRAFTERS | {"lookup"})
    finally:
        joined.set()
        reader.join(timeout=300)
    assert set(texts) == {plain}
    after = cluster.processes()
    assert {name: after[name] for name in before} == before
    used = ask(cluster).metrics["speculative_decoding"]
    assert list(used["accepted_by_drafter"]) == ["math", "chat", "code", "lookup", "ngram"]


def test_answers_come_beside_a_busy_machine(cluster: Cluster) -> None:
    """Two programs for every core, as a compiler starts them."""
    plain = text_of(cluster, max_tokens=4)
    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        started = time.monotonic()
        assert text_of(cluster, max_tokens=4) == plain
        assert time.monotonic() - started < 60
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_replicas_run_at_normal_priority(cluster: Cluster) -> None:
    for pid in cluster.processes().values():
        assert {os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir(f"/proc/{pid}/task")} == {0}


def test_what_is_scaled_to_zero_is_up_and_starts_with_the_first_request(cluster: Cluster) -> None:
    plain = text_of(cluster)
    config = cluster.changed()
    idle = {
        "min_replicas": 0, "max_replicas": 1, "target_ongoing_requests": 12, "downscale_delay_s": 1,
        "look_back_period_s": 11,  # Serve wants it longer than it takes from one report to the next
    }  # fmt: skip
    core, last = config["applications"][0], config["applications"][-1]
    verifier = next(d for d in core["deployments"] if d["name"] == "Verifier")
    for deployment in (verifier, last["deployments"][0]):
        deployment["autoscaling_config"] = idle
    cluster.apply(config)

    def counts() -> tuple[int, int]:
        return cluster.num_replicas("core", "Verifier"), cluster.num_replicas(last["name"], "Drafter")

    assert eventually(counts, lambda found: not any(found), 120) == (0, 0)

    def healthy() -> float:
        health = httpx.get(f"{cluster.url}/health", timeout=10)
        assert health.status_code == 200, "it stays so when the directory looks again"
        assert last["name"] in health.json()["drafters"]
        return time.monotonic()

    looked_again = time.monotonic() + (1 + RAREST) * RouterArgs().discovery_interval_s
    eventually(healthy, lambda now: now > looked_again)
    assert text_of(cluster) == plain
