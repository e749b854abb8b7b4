"""Runs a Ray cluster of a few nodes on this machine until stdin closes.

Tests start this module as a separate process, so that the cluster has its own environment with tokens, and receives jobs over
HTTP as a real cluster does. A line "kill" on stdin kills the node that was added last.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from places import free_port
from ray.cluster_utils import Cluster

HOST = "127.0.0.1"


def main(num_nodes: int) -> None:
    # Ray 2.60: the head starts no job agent if its address is 127.0.0.1 or the default port of the agent is in use.
    # Each node unpacks jobs in its own folder, as nodes on separate machines do.
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
