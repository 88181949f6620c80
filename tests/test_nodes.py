"""Several nodes: sessions spread, conversations find their verifier again, a lost node costs no answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cluster.nodes import LocalNodes
from tests.cluster import Cluster, ask, eventually, streamed_text, text_of
from tests.prompts import PROMPTS
from tests.serve import test_asking

pytestmark = pytest.mark.serve
ANSWERS = 8
Nodes = tuple[Cluster, LocalNodes]


@pytest.fixture(scope="module")
def nodes(target_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and two workers, each with a verifier and a drafter of each specialist."""
    with Cluster.on_nodes(tmp_path_factory.mktemp("nodes"), 2) as running:
        yield running


def said(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def test_every_node_has_one_of_each_and_sessions_spread(nodes: Nodes) -> None:
    cluster, _ = nodes
    for application, deployment in (("core", "Verifier"), ("math", "Drafter"), ("chat", "Drafter")):
        assert len(set(cluster.replicas(application, deployment).values())) == 2
    # By chance one of two verifiers has none or one of 8 conversations once in 14 times, of 24 once in 300,000.
    asked = [said(f"{prompt} {number}") for prompt in PROMPTS[:ANSWERS] for number in range(3)]
    with ThreadPoolExecutor(ANSWERS) as pool:
        list(pool.map(lambda messages: text_of(cluster, messages=messages), asked))

    def answering() -> int:
        """Verifiers that have had several sessions. Serve's own counters leave out most leases."""
        return sum(number > 1 for number in cluster.metrics("taps_sessions_total").values())

    assert eventually(answering, lambda found: found == 2, 120) == 2


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
def test_what_holds_with_haproxy_holds_with_serves_own_proxy(
    nodes: Nodes, holds: Callable[[Cluster], None]
) -> None:
    cluster, _ = nodes
    assert "server" in httpx.get(f"{cluster.url}/-/healthz", timeout=60).headers, "HAProxy names none"
    holds(cluster)


def test_a_conversation_goes_to_the_verifier_that_holds_it(nodes: Nodes) -> None:
    """By chance alone all of them would once in 256 times."""
    cluster, _ = nodes
    for prompt in PROMPTS[:ANSWERS]:
        first = ask(cluster, messages=said(prompt), max_tokens=48)
        answer = {"role": "assistant", "content": first.choices[0].message.content}
        second = ask(cluster, messages=[*said(prompt), answer, *said("Go on.")])
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_concurrent_turns_of_one_conversation_are_all_answered(nodes: Nodes) -> None:
    cluster, _ = nodes
    with ThreadPoolExecutor(ANSWERS) as pool:
        texts = set(pool.map(lambda _: text_of(cluster), range(ANSWERS)))
    assert len(texts) == 1


def test_a_specialist_scales_by_its_own_sessions(nodes: Nodes) -> None:
    cluster, _ = nodes
    config = cluster.changed()
    for application in config["applications"][1:]:
        (deployment,) = application["deployments"]
        del deployment["num_replicas"]
        deployment["autoscaling_config"] = {
            "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1,
            "downscale_delay_s": 1, "metrics_interval_s": 1, "look_back_period_s": 2,
        }  # fmt: skip
    cluster.apply(config)
    wait_for(cluster, (1, 1))
    cluster.wait_for_drafters({"math", "chat", "ngram"})
    over = threading.Event()

    def keep_asking(prompt: str) -> None:
        while not over.is_set():
            named = {"taps": {"strategy": "single", "drafters": ["math"]}}
            ask(cluster, messages=said(prompt), max_tokens=48, extra_body=named)

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, prompt) for prompt in PROMPTS[:3]]
        try:
            wait_for(cluster, (2, 1))
        finally:
            over.set()
            for one in asking:
                one.result()
    wait_for(cluster, (1, 1))


def wait_for(cluster: Cluster, wanted: tuple[int, int]) -> None:
    """Until math and chat have so many replicas that run."""

    def running() -> tuple[int, int]:
        return len(cluster.replicas("math", "Drafter")), len(cluster.replicas("chat", "Drafter"))

    assert eventually(running, lambda found: found == wanted, 240) == wanted


def test_a_node_that_is_lost_costs_no_answer(nodes: Nodes) -> None:
    cluster, local = nodes
    off = {"taps": {"strategy": "off"}}
    plain = [text_of(cluster, messages=said(p), max_tokens=96, extra_body=off) for p in PROMPTS[:6]]
    began = threading.Barrier(7, timeout=120)

    def answer(prompt: str) -> str:
        stream = iter(ask(cluster, messages=said(prompt), max_tokens=96, stream=True))
        text = streamed_text([next(stream) for _ in range(3)])
        began.wait()
        return text + streamed_text(stream)

    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(answer, PROMPTS[:6])
        began.wait()
        local.kill(0)
        assert list(answers) == plain
    assert text_of(cluster, messages=said(PROMPTS[7])), "new ones are answered by the other node"
