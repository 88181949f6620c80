"""A real Ray Serve cluster for tests: started from the shipped config, changed the way users change it."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import openai
import ray
import yaml
from ray import serve
from ray.serve._private import api as serve_api

from cluster.nodes import LocalNodes, local_nodes
from deployments.priority import NICENESS

T = TypeVar("T")
PROJECT = Path(__file__).resolve().parent.parent
MODEL = "SmolLM2-135M-Instruct"
START_DEADLINE_S = 400.0
QUESTION = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?"
USER = [{"role": "user", "content": QUESTION}]
DRAFTERS = {"math", "chat", "code", "ngram"}  # of the shipped configuration


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(look: Callable[[], T], holds: Callable[[T], bool], deadline_s: float = START_DEADLINE_S) -> T:
    """What `look` finds of another process once that holds. Raises TimeoutError with what it found last."""
    deadline = time.monotonic() + deadline_s
    while not holds(found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {deadline_s:g} s: {found}")
        time.sleep(0.5)  # between two looks; other processes give no sign to wait for
    return found


class Cluster:
    """One running cluster: its config, its HTTP address, and its replicas' processes."""

    def __init__(self, directory: Path, dashboard: str, config: str = "serve_config.yaml") -> None:
        self._directory = directory
        self._dashboard = dashboard
        self.config: dict[str, Any] = yaml.safe_load((PROJECT / config).read_text())
        self.config["http_options"]["port"] = free_port()
        self.config["applications"][0]["args"]["target"]["dtype"] = "float32"
        self.url = f"http://127.0.0.1:{self.config['http_options']['port']}"

    @classmethod
    @contextmanager
    def start(cls, directory: Path) -> Iterator[Cluster]:
        """The shipped config, with the target in float32 so that texts can be compared exactly."""
        port = free_port()
        os.environ[NICENESS] = "0"  # as `make serve` does
        ray.init("local", num_cpus=2, include_dashboard=True, dashboard_port=port, log_to_driver=False)
        try:
            cluster = cls(directory, f"http://127.0.0.1:{port}")
            cluster.apply(cluster.config)
            cluster.wait_for_drafters(DRAFTERS)
            yield cluster
        finally:
            cast(Any, serve).shutdown()
            ray.shutdown()

    @classmethod
    @contextmanager
    def on_nodes(cls, directory: Path, workers: int) -> Iterator[tuple[Cluster, LocalNodes]]:
        """The shipped config for several nodes, on as many here, with the target in float32."""
        port = free_port()
        os.environ[NICENESS] = "0"
        with local_nodes(workers, port) as nodes:
            ray.init(address=nodes.address, log_to_driver=False)
            try:
                cluster = cls(directory, f"http://127.0.0.1:{port}", "cluster/serve_config.nodes.yaml")
                cluster.apply(cluster.config)
                cluster.wait_for_drafters({"math", "chat", "ngram"})
                yield cluster, nodes
            finally:
                cast(Any, serve).shutdown()
                ray.shutdown()

    def apply(self, config: dict[str, Any]) -> None:
        """What a user does: write the file, `serve deploy` it."""
        path = self._directory / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).parent / "serve"), "deploy", "-a", self._dashboard, str(path)]
        # Another shell knows nothing of the token that Ray gave this process.
        other_shell = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env = other_shell | {"RAY_AUTH_MODE": "token"}
        subprocess.run(command, check=True, timeout=120, capture_output=True, env=env)
        self.config = config

    def changed(self) -> dict[str, Any]:
        """A copy of the config to change and apply."""
        return copy.deepcopy(self.config)

    def wait_for_drafters(self, names: set[str]) -> None:
        """Until /health is 200 and lists exactly these drafters."""

        def up() -> set[str] | str:
            try:
                answer = httpx.get(f"{self.url}/health", timeout=10)
            except httpx.HTTPError as error:
                return repr(error)
            return set(answer.json()["drafters"]) if answer.status_code == 200 else answer.text

        eventually(up, lambda found: found == names)

    def processes(self) -> dict[str, int]:
        """Application and deployment -> process id of its one replica, once all of them run."""

        def replicas() -> dict[str, Any]:
            details = cast(Any, serve_api)._get_global_client().get_serve_details()
            return {
                f"{app}.{name}": deployment["replicas"]
                for app, info in details["applications"].items()
                for name, deployment in info["deployments"].items()
            }

        def run(found: dict[str, Any]) -> bool:
            return all(len(r) == 1 and r[0]["state"] == "RUNNING" for r in found.values())

        return {name: r[0]["pid"] for name, r in eventually(replicas, run).items()}

    def replicas(self, application: str, deployment: str) -> dict[str, str]:
        """Replica -> the node it runs on, of those that run."""
        details = cast(Any, serve_api)._get_global_client().get_serve_details()
        deployments = details["applications"].get(application, {}).get("deployments", {})
        found = deployments.get(deployment, {}).get("replicas", ())  # none while it is being deployed
        return {one["replica_id"]: one["node_id"] for one in found if one["state"] == "RUNNING"}

    def num_replicas(self, application: str, deployment: str) -> int:
        """How many of a deployment there are, in any state."""
        status = serve.status().applications[application].deployments[deployment]
        return sum(status.replica_states.values())

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, as Ray exports it for Prometheus."""
        return sum(self.metrics(name).values())

    def metrics(self, name: str) -> dict[str, float]:
        """A metric by its labels, of all nodes."""
        lines = (line for line in self._exported() if re.match(rf"ray_{name}[ {{]", line))
        return {labels: float(value) for labels, value in (line.rsplit(" ", 1) for line in lines)}

    def metric_names(self) -> set[str]:
        """Of all that Ray exports for Prometheus now."""
        return {re.split(r"[ {]", line, maxsplit=1)[0] for line in self._exported()}

    def _exported(self) -> Iterator[str]:
        """What Prometheus reads of all nodes, line by line, without comments."""
        for node in cast(Any, ray).nodes():
            if node["Alive"]:
                address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                lines = httpx.get(address, timeout=30).text.splitlines()
                yield from (line for line in lines if not line.startswith("#"))

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300, max_retries=0)


def ask(cluster: Cluster, **options: Any) -> Any:
    settings: dict[str, Any] = {"messages": USER, "max_tokens": 32, "temperature": 0, **options}
    client = cluster.client
    if settings.get("stream"):
        return client.chat.completions.create(model=MODEL, **settings)
    with client:  # its sockets are closed here, in whichever thread this is
        return client.chat.completions.create(model=MODEL, **settings)


def text_of(cluster: Cluster, **options: Any) -> str:
    content: str = ask(cluster, **options).choices[0].message.content
    return content


def streamed_text(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
