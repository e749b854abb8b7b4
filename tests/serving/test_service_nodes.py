"""The service on a joined cluster: it waits for nodes, uses only nodes with its labels, and resolves relative paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import free_port
from serving_set import TwoTeams

pytestmark = [pytest.mark.ray, pytest.mark.cluster]

# the nodes run in another folder than the program that starts the service
SERVICE = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
import ray
from ray.cluster_utils import Cluster
from ray._private.state import actors
from focus_ray.errors import ConfigError, TrainingError
from focus_ray.serving import launch
from focus_ray.serving.settings import parse_service_settings

if __name__ == "__main__":
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=4, labels={"site": "a"})
    folder, port = sys.argv[1], int(sys.argv[2])
    os.chdir(folder)
    os.environ["RAY_ADDRESS"] = nodes.address
    launch._REPORT_EVERY_S = 1.0
    lines = Queue()
    scaling = {"min_replicas": 2, "max_replicas": 2, "max_replicas_per_node": 1}
    tree = {"registry": "registry", "labels": {"site": "b"}, "ingress": scaling, "pool": {"num_cpus": 0.5}}

    def run_service_once():
        settings = parse_service_settings({**tree, "tokens": "tokens.yaml"})
        with launch.run_service(settings, port=port, log=lines.put):
            sites = {node["NodeID"]: node["Labels"].get("site") for node in ray.nodes()}
            replicas = [actor for actor in actors().values() if "ServeReplica" in actor["ActorClassName"]]
            places = [(actor["ActorClassName"], actor["Address"]["NodeID"]) for actor in replicas]
            try:
                with launch.run_service(settings, port=port):
                    second_service = ""
            except ConfigError as error:
                second_service = str(error)
            return [(name, sites[node], node) for name, node in places], second_service

    with ThreadPoolExecutor(1) as thread:
        service = thread.submit(run_service_once)
        first_line = lines.get(timeout=300)
        for _ in range(2):
            nodes.add_node(num_cpus=1, labels={"site": "b"})  # works only in the main thread
        replicas, second_service = service.result()
    try:
        with launch.run_service(parse_service_settings({**tree, "tokens": "missing.yaml"}), port=port):
            failure = ""
    except TrainingError as error:
        failure = str(error)
    print(json.dumps({"first_line": first_line, "replicas": replicas, "failure": failure,
                      "second_service": second_service}))
    ray.shutdown()
    nodes.shutdown()
"""


@pytest.fixture(scope="module")
def report(plant: TwoTeams, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-c", SERVICE, str(Path(plant.registry).parent), str(free_port())],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path_factory.mktemp("nodes"),
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def test_replicas_wait_for_nodes_with_the_labels_and_the_wait_is_reported(report: dict[str, Any]) -> None:
    assert report["first_line"].startswith(("waiting for 0 min: ingress: ", "waiting for 0 min: scorer: "))
    assert {site for _, site, _ in report["replicas"]} == {"b"}


def test_ingress_replicas_are_on_separate_nodes(report: dict[str, Any]) -> None:
    nodes = [node for name, _, node in report["replicas"] if ":ingress" in name]
    assert len(nodes) == len(set(nodes)) == 2


def test_a_second_service_does_not_replace_the_first(report: dict[str, Any]) -> None:
    assert "application focus-ray" in report["second_service"]


def test_a_replica_that_cannot_start_is_reported_in_one_line(report: dict[str, Any]) -> None:
    failure = report["failure"]
    assert "ConfigError" in failure
    assert "/missing.yaml" in failure
    assert "\n" not in failure
