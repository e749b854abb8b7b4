"""Runs a Ray cluster of a few nodes on this machine until its stdin closes; tests start it as a process of its own.

So the cluster has an environment of its own, tokens on, and jobs come to it as they come to any cluster: over HTTP.
A line "kill" on stdin ends the node that was added last, by force.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from places import free_port
from ray.cluster_utils import Cluster

HOST = "127.0.0.1"


def main(num_nodes: int) -> None:
    # with 127.0.0.1 for its address, or the agent's usual port taken, the head has no job agent (Ray 2.60)
    # each node unpacks jobs in a folder of its own, as it would on a machine of its own
    def node(**options: Any) -> dict[str, Any]:
        port = free_port()
        return {"num_cpus": 2, "dashboard_agent_listen_port": port, "runtime_env_dir_name": f"envs-{port}", **options}

    dashboard = {"include_dashboard": True, "dashboard_host": HOST, "dashboard_port": free_port()}
    nodes = Cluster(initialize_head=True, head_node_args=node(**dashboard))
    added = [nodes.add_node(**node(labels={"site": "b"})) for _ in range(num_nodes - 1)]
    nodes.wait_for_nodes()
    print(json.dumps({"address": f"http://{nodes.head_node.webui_url}", "gcs": nodes.address}), flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            nodes.remove_node(added.pop(), allow_graceful=False)
            print(json.dumps({"killed": True}), flush=True)
    nodes.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
