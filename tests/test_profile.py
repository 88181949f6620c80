"""Where a step's time goes: stacks are told apart by what their innermost known frame is for."""

from __future__ import annotations

import os

from cluster.profile import cpu_seconds, shares


def test_the_innermost_known_frame_says_what_a_sample_is_for() -> None:
    stacks = """\
run (ray/serve/replica.py:1);step (deployments/generation.py:9);plan (taps/adaptive/policy.py:3) 6
run (ray/serve/replica.py:1);put (deployments/link.py:40) 2
run (ray/serve/replica.py:1);chat (deployments/endpoints.py:8);send (site-packages/uvicorn/h11.py:7) 1
select (asyncio/selectors.py:5) 1
"""
    assert shares(stacks) == {"policy": 0.6, "links": 0.2, "HTTP": 0.1, "event loop": 0.1}
    assert shares("") == {}


def test_processor_time_is_read_from_the_system() -> None:
    before = cpu_seconds(os.getpid())
    sum(n * n for n in range(2_000_000))
    assert cpu_seconds(os.getpid()) > before
    assert cpu_seconds(1 << 30) == 0.0
