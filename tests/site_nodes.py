"""Runs every command on a cluster of three sites, and prints what happened as JSON. `test_sites.py` starts it as a process.

Only the nodes of site a can use the bucket. The nodes of site b have wrong credentials. The S3 server of site c accepts
connections and never answers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from places import free_port
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks

from focus_ray.cli.main import main
from focus_ray.cluster.preflight import check_storage_on_nodes
from focus_ray.errors import DataError
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train

LABELS = "cluster.labels.site=a"


@contextlib.contextmanager
def set_variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Context manager: changes environment variables, which the processes of a new node inherit."""
    earlier = dict(os.environ)
    os.environ.update(changes)
    yield
    os.environ.clear()
    os.environ.update(earlier)


def check_storage(root: str, labels: Mapping[str, str], timeout_s: float = 60) -> tuple[str, list[str]]:
    """Returns the error of `check_storage_on_nodes`, or an empty text, and its messages."""
    messages: list[str] = []
    try:
        check_storage_on_nodes([], [root], labels, messages.append, timeout_s)
    except DataError as error:
        return str(error), messages
    return "", messages


def run_command(*words: str) -> tuple[int, str]:
    """Runs a focus-ray command in this process. Returns its exit status and the text on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.redirect_stdout(io.StringIO()):
        status = main(words)
    return status, text.getvalue()


def run_commands(images: str, root: str, config: dict[str, Any]) -> dict[str, Any]:
    """Runs the commands with the label of site a, and `evaluate` also without labels. Returns name -> (status, messages)."""
    results: dict[str, Any] = {
        "ingest": run_command("ingest", images, f"{root}/data", "--category", "gear", "--workers", "2", LABELS),
    }
    (bundle,) = train(parse_config(config, is_fitted=True)).values()
    evaluate = ("evaluate", bundle, "--output", f"{root}/report", "trackers={}")
    results["evaluate"] = run_command(*evaluate, LABELS)
    results["inspect-batch"] = run_command("inspect-batch", bundle, f"{root}/data", f"{root}/verdicts", LABELS)
    results["evaluate without labels"] = run_command(*evaluate)
    return results


def run(images: str, root: str, config: dict[str, Any]) -> None:
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    silent_server = socket.create_server(("127.0.0.1", 0))
    changes = {
        "a": {},
        "b": {"AWS_SECRET_ACCESS_KEY": "wrong"},
        "c": {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent_server.getsockname()[1]}"},
    }
    nodes = {}
    for site, variables in changes.items():
        with set_variables(variables):
            nodes[site] = cluster.add_node(num_cpus=2, labels={"site": site}).node_id
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    checks = {
        "a": check_storage(root, {"site": "a"}),
        "a or c": check_storage(
            root, {"site": "in(a,c)"}, timeout_s=20
        ),  # site a has a running worker and answers quickly
        "c": check_storage(root, {"site": "c"}, timeout_s=1),
        "d": check_storage(root, {"site": "d"}),
        "none": check_storage(root, {}),  # ends with the answer of site b, without waiting for site c
    }
    results = run_commands(images, root, config)
    places: dict[str, list[str]] = {}
    for task in list_tasks(limit=10_000):
        places.setdefault(task.name, []).append(task.node_id)
    print(json.dumps({"nodes": nodes, "checks": checks, "results": results, "places": places}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
