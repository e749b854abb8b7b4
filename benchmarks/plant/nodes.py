"""A Ray cluster whose nodes die at random and are replaced; a process of its own, since Ray starts nodes from main threads only.

Prints its address; on a line "deaths" how many nodes have died so far; ends with its stdin.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import time

from benchmarks.plant.watch import ROOT

STARTS_S = 5.0  # until a node takes part
LIVES_S = (4.0, 16.0)  # from then on, drawn anew for each


class NodeProcesses:
    """Runs while it is open."""

    def __init__(self, num_nodes: int, seed: int | None) -> None:
        """seed: of the times; None lets all live."""
        self._command = [sys.executable, "-m", "benchmarks.plant.nodes", str(num_nodes), str(seed or "")]

    def __enter__(self) -> NodeProcesses:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.address: str = self._answer()["address"]
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=120)

    @property
    def list_deaths(self) -> int:
        assert self._process.stdin
        self._process.stdin.write("deaths\n")
        self._process.stdin.flush()
        return int(self._answer()["deaths"])

    def _answer_requests(self) -> dict[str, str]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray prints too
                return dict(json.loads(line))
        raise SystemExit("the cluster's process has ended")


def main(num_nodes: int, seed: int | None) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    draw = random.Random(seed)
    ends: dict[object, float] = {}

    def add_node() -> None:
        node = cluster.add_node(num_cpus=1, wait=False, node_ip_address="127.0.0.2")  # not the head's
        ends[node] = time.monotonic() + STARTS_S + draw.uniform(*LIVES_S) if seed is not None else float("inf")

    for _ in range(num_nodes):
        add_node()
    print(json.dumps({"address": cluster.address}), flush=True)
    deaths = 0
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.2)
        if ready:
            if not sys.stdin.readline():
                break
            print(json.dumps({"deaths": deaths}), flush=True)
        for node in [node for node, end in ends.items() if end < time.monotonic()]:
            del ends[node]
            cluster.remove_node(node, allow_graceful=False)
            deaths += 1
            add_node()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2] else None)
