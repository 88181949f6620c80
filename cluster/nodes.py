"""A Ray cluster of several nodes on this machine: tries on one what runs on many, the loss of a node included.

    python -m cluster.nodes --workers 2 serve run cluster/serve_config.nodes.yaml

Starts a head, for HTTP and the router, and workers beside it, for verifiers and drafters, then runs the command
in that cluster; the nodes end with it. Knows nodes and what they are labelled with; nothing of what is served.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from ray.cluster_utils import Cluster

FRONT, PEERS = {"front": 1}, {"peers": 1}  # resources that configurations place deployments by
_DASHBOARD_PORT = 8265


class LocalNodes:
    """A head and its workers, all on this machine."""

    def __init__(self, workers: int, dashboard_port: int = _DASHBOARD_PORT) -> None:
        cpus = os.cpu_count() or 1
        head = {
            "num_cpus": cpus,
            "resources": FRONT,
            "include_dashboard": True,
            "dashboard_port": dashboard_port,
        }
        self._cluster: Any = cast(Any, Cluster)(initialize_head=True, head_node_args=head)
        self.workers = [self._cluster.add_node(num_cpus=cpus, resources=PEERS) for _ in range(workers)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill(self, worker: int) -> str:
        """End a worker and all its processes at once, as when a machine is lost; returns the node's id."""
        node = self.workers.pop(worker)
        self._cluster.remove_node(node, allow_graceful=False)
        return str(node.node_id)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def local_nodes(workers: int, dashboard_port: int = _DASHBOARD_PORT) -> Iterator[LocalNodes]:
    """Nodes that end with the block. Raises what Ray raises where they do not start."""
    nodes = LocalNodes(workers, dashboard_port)
    try:
        yield nodes
    finally:
        nodes.shutdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.nodes", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="nodes beside the head (default: 2)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="runs in the cluster")
    args = parser.parse_args(argv)
    if not args.command or args.workers < 1:
        parser.error("give at least one worker and the command to run, as in `serve run CONFIG`")
    with local_nodes(args.workers) as nodes:
        print(f"{args.workers} workers and a head at {nodes.address}", file=sys.stderr, flush=True)
        running = subprocess.Popen(args.command, env={**os.environ, "RAY_ADDRESS": nodes.address})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda sent, _: running.send_signal(sent))
        return running.wait()


if __name__ == "__main__":
    sys.exit(main())
